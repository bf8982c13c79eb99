#include "ops/cuda/linear.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <tuple>
#include <vector>

#include "base/check.h"
#include "ops/cuda/fp8_product.h"
#include "ops/cuda/fp8_rows.h"

namespace triaxial::cuda {
namespace {

// What NVIDIA recommends for Hopper.
constexpr size_t kWorkspaceBytes = size_t{64} << 20;
constexpr int kCandidates = 16;
constexpr int64_t kSmallRows = 256;

void CublasOk(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw CudaError(std::string("cuBLASLt failed in ") + what + ": " + cublasLtGetStatusString(status));
}

class Layout {
 public:
  Layout(cudaDataType type, int64_t rows, int64_t columns) {
    CublasOk(cublasLtMatrixLayoutCreate(&layout_, type, static_cast<uint64_t>(rows),
                                        static_cast<uint64_t>(columns), rows),
             "cublasLtMatrixLayoutCreate");
  }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  ~Layout() { cublasLtMatrixLayoutDestroy(layout_); }
  operator cublasLtMatrixLayout_t() const { return layout_; }  // NOLINT: implicit by design

 private:
  cublasLtMatrixLayout_t layout_ = nullptr;
};

cudaDataType TypeOf(Element element) { return element == Element::kF32 ? CUDA_R_32F : CUDA_R_16BF; }

// A product of one shape and number of rows. In cuBLAS's column-major view it is Y^T = W X^T.
class Product {
 public:
  Product(const LinearShape& shape, bool fp8, int64_t rows)
      : weights_(fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF, shape.in, shape.out),
        input_(fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF, shape.in, rows),
        output_(TypeOf(shape.output), shape.out, rows),
        beta_(shape.epilogue == Epilogue::kAdd ? 1.0f : 0.0f),
        bias_(shape.bias) {
    CHECK(shape.input == Element::kBf16 && shape.epilogue != Epilogue::kGeluErf);
    CublasOk(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F),
             "cublasLtMatmulDescCreate");
    const cublasOperation_t transpose = CUBLAS_OP_T;
    Set(CUBLASLT_MATMUL_DESC_TRANSA, transpose);
    const bool gelu = shape.epilogue == Epilogue::kGeluTanh;
    const cublasLtEpilogue_t epilogue = bias_ ? (gelu ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_BIAS)
                                              : (gelu ? CUBLASLT_EPILOGUE_GELU : CUBLASLT_EPILOGUE_DEFAULT);
    Set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (bias_) Set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, TypeOf(shape.output));
    if (fp8) {
      // Element (i, j) of the product times weight scale i and input scale j.
      constexpr cublasLtMatmulMatrixScale_t kOuter = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
      Set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, kOuter);
      Set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, kOuter);
    }
  }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;
  ~Product() { cublasLtMatmulDescDestroy(operation_); }

  // With FP8 weights cuBLASLt proposes nothing before it has seen pointers to scales.
  std::vector<cublasLtMatmulAlgo_t> Propose(cublasLtHandle_t handle, const LinearWeights& linear,
                                            const float* x_scales, int count) {
    SetScales(linear, x_scales);
    cublasLtMatmulPreference_t preference = nullptr;
    CublasOk(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                         &kWorkspaceBytes, sizeof(kWorkspaceBytes));
    std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(count));
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle, operation_, weights_, input_, output_, output_, preference, count, results.data(), &found);
    cublasLtMatmulPreferenceDestroy(preference);
    CublasOk(status, "cublasLtMatmulAlgoGetHeuristic");
    std::vector<cublasLtMatmulAlgo_t> algorithms;
    for (int i = 0; i < found; ++i) {
      if (results[static_cast<size_t>(i)].state == CUBLAS_STATUS_SUCCESS)
        algorithms.push_back(results[static_cast<size_t>(i)].algo);
    }
    if (algorithms.empty()) throw CudaError("cuBLASLt knows no algorithm for a product of the model");
    return algorithms;
  }

  // x: of the weights' type; x_scales: with FP8 weights alone.
  cublasStatus_t Run(cublasLtHandle_t handle, const LinearWeights& linear, const void* x,
                     const float* x_scales, void* y, const cublasLtMatmulAlgo_t& algorithm, void* workspace,
                     cudaStream_t stream) {
    if (bias_) Set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, linear.bias);
    SetScales(linear, x_scales);
    const float one = 1.0f;
    return cublasLtMatmul(handle, operation_, &one, linear.weights, weights_, x, input_, &beta_, y, output_,
                          y, output_, &algorithm, workspace, kWorkspaceBytes, stream);
  }

  cublasLtMatmulAlgo_t algorithm;

 private:
  void SetScales(const LinearWeights& linear, const float* x_scales) {
    if (linear.scales == nullptr) return;
    Set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, linear.scales);
    Set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x_scales);
  }
  template <typename T>
  void Set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    CublasOk(cublasLtMatmulDescSetAttribute(operation_, attribute, &value, sizeof(value)),
             "cublasLtMatmulDescSetAttribute");
  }

  cublasLtMatmulDesc_t operation_ = nullptr;
  Layout weights_, input_, output_;
  float beta_;
  bool bias_;
};

// Whether an FP8 product of so many rows is Fp8Product's.
bool OwnProduct(const LinearShape& shape, int64_t rows) {
  return HasFp8Product(rows, shape.in, shape.out) && !shape.bias &&
         (shape.epilogue == Epilogue::kNone || shape.epilogue == Epilogue::kAdd);
}

}  // namespace

struct LinearRunner::State {
  cublasLtHandle_t handle = nullptr;
  DeviceBuffer workspace{kWorkspaceBytes};
  std::map<std::tuple<LinearShape, bool, int64_t>, std::unique_ptr<Product>> products;  // shape, FP8, rows
  DeviceBuffer fp8_input, fp8_scales;

  // x as the product reads it.
  const void* InputOf(const LinearWeights& linear, const void* x, int64_t rows, cudaStream_t stream) {
    if (linear.scales == nullptr) return x;
    CHECK(static_cast<size_t>(rows * linear.shape.in) <= fp8_input.size() &&
          static_cast<size_t>(rows) * sizeof(float) <= fp8_scales.size());
    QuantizeRows(static_cast<const uint16_t*>(x), rows, linear.shape.in, fp8_input.data(),
                 fp8_scales.data<float>(), stream);
    return fp8_input.data();
  }

  State() { CublasOk(cublasLtCreate(&handle), "cublasLtCreate"); }
  ~State() { cublasLtDestroy(handle); }
};

LinearRunner::LinearRunner() : state_(std::make_unique<State>()) {}
LinearRunner::~LinearRunner() = default;

void LinearRunner::ReserveFp8(int64_t rows, int64_t columns) {
  state_->fp8_input.Reserve(static_cast<size_t>(rows * columns));
  state_->fp8_scales.Reserve<float>(rows);
}

void LinearRunner::Run(const LinearWeights& linear, const void* x, int64_t rows, void* y,
                       cudaStream_t stream) {
  if (rows == 0) return;
  const bool fp8 = linear.scales != nullptr;
  const LinearShape& shape = linear.shape;
  const void* input = state_->InputOf(linear, x, rows, stream);
  if (fp8 && OwnProduct(shape, rows)) {
    Fp8Product(static_cast<const uint8_t*>(linear.weights), linear.scales, static_cast<const uint8_t*>(input),
               state_->fp8_scales.data<float>(), rows, shape.in, shape.out, shape.output,
               shape.epilogue == Epilogue::kAdd, y, stream);
    return;
  }
  std::unique_ptr<Product>& product = state_->products[{linear.shape, fp8, rows}];
  if (product == nullptr) {
    auto made = std::make_unique<Product>(linear.shape, fp8, rows);
    made->algorithm = made->Propose(state_->handle, linear, state_->fp8_scales.data<float>(), 1).front();
    product = std::move(made);
  }
  CublasOk(product->Run(state_->handle, linear, input, state_->fp8_scales.data<float>(), y,
                        product->algorithm, state_->workspace.data(), stream),
           "cublasLtMatmul");
}

void LinearRunner::Tune(std::span<const LinearWeights> layers, void* x, int64_t rows, void* y,
                        cudaStream_t stream) {
  CHECK(!layers.empty() && rows > 0);
  const LinearShape& shape = layers.front().shape;
  // An algorithm that reads small inputs in another way is chosen on numbers, not on whatever lies there.
  CUDA_OK(cudaMemsetAsync(x, 0x3c, static_cast<size_t>(rows * shape.in * 2), stream));
  const bool fp8 = layers.front().scales != nullptr;
  if (fp8 && OwnProduct(shape, rows)) return;
  auto product = std::make_unique<Product>(shape, fp8, rows);
  const void* input = state_->InputOf(layers.front(), x, rows, stream);
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  // Proposals differ by a few percent, and so do two timings of one: small products, which are timed in no
  // time, take turns three times, and the best of each counts.
  constexpr int kWarm = 2;
  const int rounds = rows <= kSmallRows ? 3 : 1;
  const int runs = rows <= kSmallRows ? 16 : 8;
  float best = std::numeric_limits<float>::infinity();
  const std::vector<cublasLtMatmulAlgo_t> algorithms =
      product->Propose(state_->handle, layers.front(), state_->fp8_scales.data<float>(), kCandidates);
  for (int round = 0; round < rounds; ++round) {
    for (const cublasLtMatmulAlgo_t& algorithm : algorithms) {
      bool ran = true;
      for (int i = 0; i < kWarm + runs && ran; ++i) {
        if (i == kWarm) CUDA_OK(cudaEventRecord(begin, stream));
        const LinearWeights& linear = layers[static_cast<size_t>(i) % layers.size()];
        ran = product->Run(state_->handle, linear, input, state_->fp8_scales.data<float>(), y, algorithm,
                           state_->workspace.data(), stream) == CUBLAS_STATUS_SUCCESS;
      }
      if (!ran) continue;
      CUDA_OK(cudaEventRecord(end, stream));
      CUDA_OK(cudaEventSynchronize(end));
      float milliseconds = 0;
      CUDA_OK(cudaEventElapsedTime(&milliseconds, begin, end));
      if (milliseconds < best) {
        best = milliseconds;
        product->algorithm = algorithm;
      }
    }
  }
  CUDA_OK(cudaEventDestroy(begin));
  CUDA_OK(cudaEventDestroy(end));
  if (best == std::numeric_limits<float>::infinity()) throw CudaError("no algorithm of cuBLASLt runs");
  state_->products[{shape, fp8, rows}] = std::move(product);
}

}  // namespace triaxial::cuda
