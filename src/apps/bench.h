// The subcommands of `triaxial bench`.
#ifndef TRIAXIAL_APPS_BENCH_H_
#define TRIAXIAL_APPS_BENCH_H_

#include "apps/commands.h"

namespace triaxial {

Command AddBenchDecode(CLI::App* bench);
Command AddBenchPrefill(CLI::App* bench);
Command AddBenchCodec(CLI::App* bench);
Command AddBenchModel(CLI::App* bench);
Command AddBenchServe(CLI::App* bench);
Command AddBenchPlot(CLI::App* bench);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_H_
