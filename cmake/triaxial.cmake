# Two helpers, so that every module's CMakeLists.txt is a list of files.

# triaxial_library(kv SOURCES a.cc b.cc DEPS base): static library triaxial_kv.
function(triaxial_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;LIBS" ${ARGN})
  add_library(triaxial_${name} STATIC ${ARG_SOURCES})
  foreach(dep ${ARG_DEPS})
    target_link_libraries(triaxial_${name} PUBLIC triaxial_${dep})
  endforeach()
  target_link_libraries(triaxial_${name} PUBLIC ${ARG_LIBS})
endfunction()

# triaxial_test(kv_codec_test LABEL unit SOURCES kv/codec_test.cc DEPS kv): one CTest test per GoogleTest binary.
# Tests run in the source root, so that models/ and tests/data are found by relative path. The target tests_unit builds
# all tests of the label unit, and so on.
function(triaxial_test name)
  cmake_parse_arguments(ARG "" "LABEL;TIMEOUT" "SOURCES;DEPS;LIBS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  foreach(dep ${ARG_DEPS})
    target_link_libraries(${name} PRIVATE triaxial_${dep})
  endforeach()
  target_link_libraries(${name} PRIVATE ${ARG_LIBS} GTest::gtest GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(NOT ARG_LABEL)
    set(ARG_LABEL unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  if(NOT TARGET tests_${ARG_LABEL})
    add_custom_target(tests_${ARG_LABEL})
  endif()
  add_dependencies(tests_${ARG_LABEL} ${name})
  set_tests_properties(${name} PROPERTIES LABELS ${ARG_LABEL} TIMEOUT ${ARG_TIMEOUT})
endfunction()
