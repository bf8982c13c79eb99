// Operators around attention and the cache on the GPU, against references in F64 on fresh random inputs.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "base/float16.h"
#include "base/float8.h"
#include "gpu_test.h"
#include "ops/cuda/device.h"
#include "ops/cuda/elementwise.h"
#include "ops/cuda/fp8_rows.h"
#include "ops/cuda/linear.h"
#include "ops/cuda/sample.h"
#include "ops/cuda/vision.h"

namespace triaxial::cuda {
namespace {

std::mt19937& Random() {
  static std::mt19937 random(20);
  return random;
}

std::vector<float> Floats(int64_t n, float deviation = 1) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& value : x) value = normal(Random());
  return x;
}
std::vector<uint16_t> Rounded(const std::vector<float>& x) {
  std::vector<uint16_t> out;
  for (const float value : x) out.push_back(FloatToBf16(value));
  return out;
}

template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : size_(values.size()) {
    buffer_.Reserve<T>(static_cast<int64_t>(size_));
    CUDA_OK(cudaMemcpy(data(), values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  // Poisoned: what is not written shows.
  explicit OnDevice(int64_t n) : size_(static_cast<size_t>(n)) {
    buffer_.Reserve<T>(n);
    CUDA_OK(cudaMemset(data(), 0xff, size_ * sizeof(T)));
  }
  T* data() const { return buffer_.template data<T>(); }
  std::vector<T> Get() const {
    std::vector<T> values(size_);
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaMemcpy(values.data(), data(), size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t size_;
  DeviceBuffer buffer_;
};

double Value(float x) { return x; }
double Value(uint16_t x) { return Bf16ToFloat(x); }

template <typename T>
double RelativeError(const std::vector<T>& found, const std::vector<double>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = Value(found[i]) - expected[i];
    if (std::isnan(difference)) return INFINITY;
    error += difference * difference;
    size += expected[i] * expected[i];
  }
  return std::sqrt(error / size);
}

CASE(Norms) {
  for (const int64_t width : {64, 320, 1152, 5120, 8192}) {
    const int64_t rows = 7;
    const std::vector<float> x = Floats(rows * width), weight = Floats(width), bias = Floats(width);
    const OnDevice<float> on_x(x), on_weight(weight), on_bias(bias);
    const std::vector<int32_t> source = {3, 0, 6, 6, 2, 1, 5};
    const OnDevice<int32_t> on_source(source);
    const OnDevice<uint16_t> rms(rows * width), picked(rows * width), layer(rows * width);
    RmsNorm(on_x.data(), nullptr, on_weight.data(), 1e-6f, rows, width, rms.data(), nullptr);
    RmsNorm(on_x.data(), on_source.data(), on_weight.data(), 1e-6f, rows, width, picked.data(), nullptr);
    LayerNorm(on_x.data(), on_weight.data(), on_bias.data(), 1e-6f, rows, width, layer.data(), nullptr);
    std::vector<double> expected_rms, expected_layer;
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = x.data() + r * width;
      double sum = 0, squares = 0, deviations = 0;
      for (int64_t i = 0; i < width; ++i) {
        sum += row[i];
        squares += double{row[i]} * row[i];
      }
      const double mean = sum / static_cast<double>(width);
      for (int64_t i = 0; i < width; ++i) deviations += (row[i] - mean) * (row[i] - mean);
      for (int64_t i = 0; i < width; ++i) {
        const auto c = static_cast<size_t>(i);
        expected_rms.push_back(row[i] / std::sqrt(squares / static_cast<double>(width) + 1e-6) * weight[c]);
        expected_layer.push_back((row[i] - mean) / std::sqrt(deviations / static_cast<double>(width) + 1e-6) *
                                     weight[c] +
                                 bias[c]);
      }
    }
    std::vector<double> expected_picked;
    for (const int32_t r : source) {
      expected_picked.insert(expected_picked.end(), expected_rms.begin() + r * width,
                             expected_rms.begin() + (r + 1) * width);
    }
    EXPECT(RelativeError(rms.Get(), expected_rms) < 3e-3, "width %d", static_cast<int>(width));
    EXPECT(RelativeError(picked.Get(), expected_picked) < 3e-3, "width %d", static_cast<int>(width));
    EXPECT(RelativeError(layer.Get(), expected_layer) < 3e-3, "width %d", static_cast<int>(width));
  }
}

CASE(Activations) {
  const int64_t rows = 5, width = 772;
  const std::vector<uint16_t> gate_up = Rounded(Floats(rows * 2 * width, 3)),
                              x = Rounded(Floats(rows * width, 3));
  const OnDevice<uint16_t> on_gate_up(gate_up), out(rows * width), gelu(x);
  SwiGlu(on_gate_up.data(), rows, width, out.data(), nullptr);
  GeluErf(gelu.data(), rows * width, nullptr);
  std::vector<double> expected, expected_gelu;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      const double g = Value(gate_up[static_cast<size_t>(r * 2 * width + i)]);
      expected.push_back(g / (1 + std::exp(-g)) *
                         Value(gate_up[static_cast<size_t>(r * 2 * width + width + i)]));
      const double value = Value(x[static_cast<size_t>(r * width + i)]);
      expected_gelu.push_back(value / 2 * (1 + std::erf(value / std::sqrt(2.0))));
    }
  }
  EXPECT(RelativeError(out.Get(), expected) < 3e-3, "error %g", RelativeError(out.Get(), expected));
  EXPECT(RelativeError(gelu.Get(), expected_gelu) < 3e-3, "error %g",
         RelativeError(gelu.Get(), expected_gelu));
}

CASE(EmbeddingsAndAngles) {
  const int64_t rows = 33, width = 320, vocab = 100;
  const std::vector<uint16_t> table = Rounded(Floats(vocab * width));
  std::vector<int32_t> tokens, positions;
  for (int64_t r = 0; r < rows; ++r) {
    tokens.push_back(static_cast<int32_t>(Random()() % vocab));
    for (int axis = 0; axis < 3; ++axis) positions.push_back(static_cast<int32_t>(Random()() % 200000));
  }
  const OnDevice<float> hidden(rows * width), cos(rows * 64), sin(rows * 64);
  EmbedTokens(OnDevice(tokens).data(), OnDevice(table).data(), rows, width, hidden.data(), nullptr);
  std::vector<float> frequencies;
  std::vector<uint8_t> axes;
  for (int k = 0; k < 64; ++k) {
    frequencies.push_back(static_cast<float>(std::pow(5e6, -k / 64.0)));
    axes.push_back(static_cast<uint8_t>(k % 3));
  }
  const OnDevice<int32_t> on_positions(positions);
  const OnDevice<float> on_frequencies(frequencies);
  const OnDevice<uint8_t> on_axes(axes);
  MropeAngles(on_positions.data(), on_frequencies.data(), on_axes.data(), rows, 64, cos.data(), sin.data(),
              nullptr);
  const std::vector<float> found = hidden.Get(), found_cos = cos.Get(), found_sin = sin.Get();
  int different = 0;
  double largest = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      different += found[static_cast<size_t>(r * width + i)] !=
                   Bf16ToFloat(table[static_cast<size_t>(tokens[static_cast<size_t>(r)] * width + i)]);
    }
    for (size_t k = 0; k < 64; ++k) {
      const float angle =
          static_cast<float>(positions[static_cast<size_t>(r) * 3 + axes[k]]) * frequencies[k];
      const size_t at = static_cast<size_t>(r) * 64 + k;
      largest = std::max({largest, std::abs(found_cos[at] - std::cos(double{angle})),
                          std::abs(found_sin[at] - std::sin(double{angle}))});
    }
  }
  EXPECT(different == 0, "%d values differ", different);
  EXPECT(largest < 1e-6, "angles differ by %g", largest);
}

CASE(Products) {
  if (SmallSizes()) return;  // racecheck fails in cuBLASLt's kernels, and there are no others here
  LinearRunner runner;
  Stream stream;
  for (const int64_t rows : {1, 5, 64, 300}) {
    for (const bool tuned : {false, true}) {
      for (const Epilogue epilogue : {Epilogue::kNone, Epilogue::kAdd, Epilogue::kGeluTanh}) {
        for (const bool bias : {false, true}) {
          const int64_t in = 328, out = 192;
          const bool f32 = epilogue != Epilogue::kGeluTanh;
          const LinearShape shape{.in = in,
                                  .out = out,
                                  .input = Element::kBf16,
                                  .output = f32 ? Element::kF32 : Element::kBf16,
                                  .epilogue = epilogue,
                                  .bias = bias};
          const std::vector<uint16_t> x = Rounded(Floats(rows * in)), w = Rounded(Floats(out * in, 0.1f));
          const std::vector<float> b = Floats(out), before = Floats(rows * out);
          const OnDevice<uint16_t> on_x(x), on_w(w), on_b16(Rounded(b)), y16(rows * out);
          const OnDevice<float> on_b(b), y(before);
          const LinearWeights linear{shape, on_w.data(),
                                     !bias ? nullptr
                                     : f32 ? static_cast<const void*>(on_b.data())
                                           : on_b16.data()};
          if (tuned) {
            const OnDevice<uint16_t> scratch(rows * in);
            const OnDevice<float> scratch_y(rows * out);
            runner.Tune({&linear, 1}, scratch.data(), rows, scratch_y.data(), stream);
          }
          runner.Run(linear, on_x.data(), rows, f32 ? static_cast<void*>(y.data()) : y16.data(), stream);
          std::vector<double> expected;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t o = 0; o < out; ++o) {
              double sum = bias ? (f32 ? double{b[static_cast<size_t>(o)]}
                                       : Value(FloatToBf16(b[static_cast<size_t>(o)])))
                                : 0;
              for (int64_t i = 0; i < in; ++i)
                sum += Value(x[static_cast<size_t>(r * in + i)]) * Value(w[static_cast<size_t>(o * in + i)]);
              if (epilogue == Epilogue::kAdd) sum += before[static_cast<size_t>(r * out + o)];
              if (epilogue == Epilogue::kGeluTanh)
                sum = sum / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (sum + 0.044715 * sum * sum * sum)));
              expected.push_back(sum);
            }
          }
          const double error = f32 ? RelativeError(y.Get(), expected) : RelativeError(y16.Get(), expected);
          EXPECT(error < (f32 ? 1e-5 : 4e-3), "rows %d, epilogue %d, bias %d: %g", static_cast<int>(rows),
                 static_cast<int>(epilogue), bias, error);
        }
      }
    }
  }
}

CASE(RowsInFp8) {
  for (const int64_t width : {16, 336, 5120, 25600, 32768}) {
    const int64_t rows = 5;
    std::vector<float> values = Floats(rows * width);
    std::fill_n(values.begin() + width, width, 0.0f);  // a row of zeros
    for (int64_t i = 0; i < width; ++i) values[static_cast<size_t>(2 * width + i)] *= 1e-6f;  // a quiet one
    values[static_cast<size_t>(3 * width)] = 3e4f;  // one loud value
    const std::vector<uint16_t> x = Rounded(values);
    const OnDevice<uint16_t> on_x(x);
    const OnDevice<uint8_t> out(rows * width);
    const OnDevice<float> scales(rows);
    QuantizeRows(on_x.data(), rows, width, out.data(), scales.data(), nullptr);
    const std::vector<uint8_t> codes = out.Get();
    const std::vector<float> found = scales.Get();
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* row = &x[static_cast<size_t>(r * width)];
      double largest = 0;
      for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::abs(Value(row[i])));
      const float scale = found[static_cast<size_t>(r)];
      EXPECT(std::abs(scale - (largest > 0 ? largest / 448 : 1)) <= 1e-6 * scale, "scale %g, largest %g",
             scale, largest);
      double worst = 0;  // in half steps of e4m3
      for (int64_t i = 0; i < width; ++i) {
        const double exact = Value(row[i]) / scale;
        const double step =
            std::exp2(std::max(-9.0, std::floor(std::log2(std::max(1e-9, std::abs(exact)))) - 3));
        worst = std::max(
            worst, std::abs(E4m3ToFloat(codes[static_cast<size_t>(r * width + i)]) - exact) / (step / 2));
      }
      EXPECT(worst < 1.001, "width %d, row %d: off by %g half steps", static_cast<int>(width),
             static_cast<int>(r), worst);
    }
  }
}

CASE(ProductsInFp8) {
  LinearRunner runner;
  Stream stream;
  runner.ReserveFp8(300, 4096);
  for (const int64_t in : {int64_t{336}, int64_t{4096}}) {
    const int64_t out = 192;
    std::vector<float> w_values = Floats(out * in, 0.1f);
    for (int64_t o = 0; o < out; ++o) {  // output channels of different size
      for (int64_t i = 0; i < in; ++i)
        w_values[static_cast<size_t>(o * in + i)] *= std::exp2(static_cast<float>(o % 9));
    }
    const OnDevice<uint16_t> w(Rounded(w_values));
    const OnDevice<uint8_t> w8(out * in);
    const OnDevice<float> w_scales(out);
    QuantizeRows(w.data(), out, in, w8.data(), w_scales.data(), stream);
    stream.Synchronize();
    const std::vector<uint8_t> w_codes = w8.Get();
    const std::vector<float> w_scale = w_scales.Get();
    for (const int64_t rows : Sizes({1, 2, 8, 13, 32, 64, 300}, {1, 8, 13, 32})) {
      for (const bool tuned : {false, true}) {
        for (const Epilogue epilogue : {Epilogue::kNone, Epilogue::kAdd}) {
          for (const Element output : {Element::kF32, Element::kBf16}) {
            if (epilogue == Epilogue::kAdd && output == Element::kBf16) continue;
            const LinearShape shape{
                .in = in, .out = out, .input = Element::kBf16, .output = output, .epilogue = epilogue};
            const LinearWeights linear{shape, w8.data(), nullptr, w_scales.data()};
            const std::vector<uint16_t> x = Rounded(Floats(rows * in));
            const std::vector<float> before = Floats(rows * out);
            const OnDevice<uint16_t> on_x(x), y16(rows * out);
            const OnDevice<uint8_t> x8(rows * in);
            const OnDevice<float> y(before), x_scales(rows);
            QuantizeRows(on_x.data(), rows, in, x8.data(), x_scales.data(), stream);
            stream.Synchronize();
            const std::vector<uint8_t> x_codes = x8.Get();
            const std::vector<float> x_scale = x_scales.Get();
            if (tuned) {
              const OnDevice<uint16_t> scratch(rows * in);
              const OnDevice<float> scratch_y(rows * out);
              runner.Tune({&linear, 1}, scratch.data(), rows, scratch_y.data(), stream);
            }
            const bool f32 = output == Element::kF32;
            runner.Run(linear, on_x.data(), rows, f32 ? static_cast<void*>(y.data()) : y16.data(), stream);
            stream.Synchronize();
            std::vector<double> expected;
            for (int64_t r = 0; r < rows; ++r) {
              for (int64_t o = 0; o < out; ++o) {
                double sum = 0;
                for (int64_t i = 0; i < in; ++i)
                  sum += double{E4m3ToFloat(x_codes[static_cast<size_t>(r * in + i)])} *
                         E4m3ToFloat(w_codes[static_cast<size_t>(o * in + i)]);
                sum *= double{x_scale[static_cast<size_t>(r)]} * w_scale[static_cast<size_t>(o)];
                if (epilogue == Epilogue::kAdd) sum += before[static_cast<size_t>(r * out + o)];
                expected.push_back(sum);
              }
            }
            const double error = f32 ? RelativeError(y.Get(), expected) : RelativeError(y16.Get(), expected);
            EXPECT(error < (f32 ? 1e-3 : 4e-3), "in %d, rows %d, epilogue %d: %g", static_cast<int>(in),
                   static_cast<int>(rows), static_cast<int>(epilogue), error);
          }
        }
      }
    }
  }
}

CASE(VisionAttention) {
  for (const int dim : {64, 72, 80, 128}) {
    for (const int64_t rows : Sizes({1, 16, 63, 130, 700}, {1, 63, 130})) {
      const int heads = 3;
      const std::vector<uint16_t> qkv = Rounded(Floats(rows * 3 * heads * dim, 1.5f));
      const OnDevice<uint16_t> on_qkv(qkv), out(rows * heads * dim);
      const float scale = 1 / std::sqrt(static_cast<float>(dim));
      FullAttention(on_qkv.data(), rows, heads, dim, scale, out.data(), nullptr);
      const auto at = [&](int64_t row, int part, int head, int c) {
        return Value(qkv[static_cast<size_t>(((row * 3 + part) * heads + head) * dim + c)]);
      };
      std::vector<double> expected(static_cast<size_t>(rows * heads * dim));
      for (int64_t r = 0; r < rows; ++r) {
        for (int h = 0; h < heads; ++h) {
          std::vector<double> weights;
          double sum = 0;
          for (int64_t s = 0; s < rows; ++s) {
            double dot = 0;
            for (int c = 0; c < dim; ++c) dot += at(r, 0, h, c) * at(s, 1, h, c);
            weights.push_back(std::exp(dot * scale));
            sum += weights.back();
          }
          for (int64_t s = 0; s < rows; ++s) {
            for (int c = 0; c < dim; ++c) {
              expected[static_cast<size_t>((r * heads + h) * dim + c)] +=
                  weights[static_cast<size_t>(s)] / sum * at(s, 2, h, c);
            }
          }
        }
      }
      const double error = RelativeError(out.Get(), expected);
      EXPECT(error < 6e-3, "dim %d, %d rows: %g", dim, static_cast<int>(rows), error);
    }
  }
}

CASE(VisionEmbeddings) {
  const int64_t patches = 24;
  const int hidden = 192, heads = 3, dim = 64, plane = 256;
  std::vector<PatchPlace> places(static_cast<size_t>(patches));
  for (PatchPlace& place : places) {
    place.row = static_cast<int32_t>(Random()() % 30);
    place.column = static_cast<int32_t>(Random()() % 30);
    for (int c = 0; c < 4; ++c) {
      place.corner[c] = static_cast<int32_t>(Random()() % 576);
      place.factor[c] = static_cast<float>(Random()() % 256) / 256;
    }
  }
  const std::vector<float> table = Floats(576 * hidden), values = Floats(3 * 256), cos = Floats(30 * dim / 4),
                           sin = Floats(30 * dim / 4);
  std::vector<uint8_t> samples(static_cast<size_t>(patches * 3 * plane));
  for (uint8_t& sample : samples) sample = static_cast<uint8_t>(Random()());
  const std::vector<uint16_t> qkv = Rounded(Floats(patches * 3 * heads * dim));
  const OnDevice<PatchPlace> on_places(places);
  const OnDevice<float> on_table(table), on_values(values), on_cos(cos), on_sin(sin), x(patches * hidden);
  const OnDevice<uint8_t> on_samples(samples);
  const OnDevice<uint16_t> pixels(patches * 3 * 2 * plane), turned(qkv);
  EmbedPatchPositions(on_places.data(), on_table.data(), patches, hidden, x.data(), nullptr);
  NormalizePixels(on_samples.data(), on_values.data(), patches, 2, plane, pixels.data(), nullptr);
  RotateGrid(on_places.data(), on_cos.data(), on_sin.data(), patches, heads, dim, turned.data(), nullptr);
  std::vector<double> expected_x, expected_pixels, expected_turned;
  for (size_t p = 0; p < places.size(); ++p) {
    for (int i = 0; i < hidden; ++i) {
      double sum = 0;
      for (int c = 0; c < 4; ++c)
        sum += double{table[static_cast<size_t>(places[p].corner[c] * hidden + i)]} * places[p].factor[c];
      expected_x.push_back(sum);
    }
    for (size_t channel = 0; channel < 3; ++channel) {
      for (int frame = 0; frame < 2; ++frame) {
        for (size_t i = 0; i < static_cast<size_t>(plane); ++i) {
          expected_pixels.push_back(
              values[channel * 256 + samples[(p * 3 + channel) * static_cast<size_t>(plane) + i]]);
        }
      }
    }
    for (int head = 0; head < 3 * heads; ++head) {
      const size_t first =
          (p * static_cast<size_t>(3 * heads) + static_cast<size_t>(head)) * static_cast<size_t>(dim);
      for (int c = 0; c < dim; ++c) {
        const double value = Value(qkv[first + static_cast<size_t>(c)]);
        if (head >= 2 * heads) {
          expected_turned.push_back(value);
          continue;
        }
        const int pair = c % (dim / 2);
        const auto angle = static_cast<size_t>((pair < dim / 4 ? places[p].row : places[p].column) * dim / 4 +
                                               pair % (dim / 4));
        const double partner = Value(qkv[first + static_cast<size_t>((c + dim / 2) % dim)]);
        expected_turned.push_back(value * cos[angle] + (c < dim / 2 ? -partner : partner) * sin[angle]);
      }
    }
  }
  EXPECT(RelativeError(x.Get(), expected_x) < 1e-6, "error %g", RelativeError(x.Get(), expected_x));
  EXPECT(RelativeError(pixels.Get(), expected_pixels) < 3e-3, "error %g",
         RelativeError(pixels.Get(), expected_pixels));
  EXPECT(RelativeError(turned.Get(), expected_turned) < 3e-3, "error %g",
         RelativeError(turned.Get(), expected_turned));
}

// The tokens that may be drawn, with their weights, by the rules of engine/sampler.h; best first.
std::vector<std::pair<int32_t, double>> Choices(const std::vector<float>& logits, const TokenDraw& draw) {
  std::vector<int32_t> order;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > -INFINITY) order.push_back(static_cast<int32_t>(i));
  }
  const auto logit = [&](int32_t i) { return std::min(logits[static_cast<size_t>(i)], 1e36f); };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logit(a) > logit(b); });
  if (draw.top_k > 0 && static_cast<size_t>(draw.top_k) < order.size())
    order.resize(static_cast<size_t>(draw.top_k));
  std::vector<std::pair<int32_t, double>> choices;
  double total = 0;
  for (const int32_t i : order) {
    choices.emplace_back(i, std::exp((double{logit(i)} - logit(order[0])) / draw.temperature));
    total += choices.back().second;
  }
  size_t size = 0;
  double kept = 0;
  while (size < choices.size() && kept < total * draw.top_p && choices[size].second >= draw.min_p)
    kept += choices[size++].second;
  choices.resize(size);
  return choices;
}

CASE(Sampling) {
  const int vocab = 20011;
  std::vector<TokenDraw> draws;
  std::vector<float> logits;
  std::uniform_real_distribution<double> uniform;
  for (int i = 0; i < (SmallSizes() ? 40 : 400); ++i) {
    TokenDraw draw;
    draw.uniform = i % 7 == 0 ? 0 : i % 7 == 1 ? 1 - 0x1p-53 : uniform(Random());
    draw.temperature = i % 5 == 0 ? 0 : static_cast<float>(0.2 + uniform(Random()));
    draw.top_k = i % 3 == 0   ? 0
                 : i % 3 == 1 ? 1 + static_cast<int>(Random()() % 50)
                              : 1 + static_cast<int>(Random()() % 30000);
    draw.top_p = i % 4 == 0 ? 1.0f : static_cast<float>(0.05 + 0.9 * uniform(Random()));
    draw.min_p = i % 6 == 0 ? static_cast<float>(uniform(Random())) : 0.0f;
    draws.push_back(draw);
    std::vector<float> row = Floats(vocab, i % 11 == 0 ? 0.01f : i % 11 == 1 ? 20.0f : 3.0f);
    if (i % 13 == 0) {  // many equal ones
      for (float& x : row) x = std::round(x);
    }
    if (i % 17 == 0) {
      for (size_t j = 0; j < row.size(); j += 3) row[j] = j % 2 == 0 ? NAN : -INFINITY;
    }
    if (i % 19 == 1) row[100] = row[5000] = INFINITY;
    if (i % 23 == 1) std::fill(row.begin(), row.end(), -INFINITY);
    if (i % 29 == 1) std::fill(row.begin(), row.end(), 1.5f);
    logits.insert(logits.end(), row.begin(), row.end());
  }
  const OnDevice<int32_t> tokens(static_cast<int64_t>(draws.size()));
  const OnDevice<float> on_logits(logits);
  const OnDevice<TokenDraw> on_draws(draws);
  SampleTokens(on_logits.data(), static_cast<int64_t>(draws.size()), vocab, on_draws.data(), tokens.data(),
               nullptr);
  const std::vector<int32_t> found = tokens.Get();
  for (size_t i = 0; i < draws.size(); ++i) {
    const std::vector<float> row(logits.begin() + static_cast<int64_t>(i) * vocab,
                                 logits.begin() + static_cast<int64_t>(i + 1) * vocab);
    TokenDraw draw = draws[i];
    const bool greedy = draw.temperature < kGreedyBelow;
    if (greedy) draw = {.temperature = 1, .top_k = 1};
    std::vector<std::pair<int32_t, double>> choices = Choices(row, draw);
    if (choices.empty()) {
      EXPECT(found[i] == -1, "row %zu: token %d of no choice", i, found[i]);
      continue;
    }
    if (greedy) {
      EXPECT(found[i] == choices[0].first, "row %zu: token %d for %d", i, found[i], choices[0].first);
      continue;
    }
    // The running sum before and behind the token encloses the draw, but for rounding of weights; tokens are
    // walked best first or by id.
    bool enclosed = false, possible = false;
    for (const bool by_id : {false, true}) {
      if (by_id) std::sort(choices.begin(), choices.end());
      double total = 0, before = -1, behind = -1;
      for (const auto& [token, weight] : choices) {
        if (token == found[i]) before = total;
        total += weight;
        if (token == found[i]) behind = total;
      }
      const double slack = 1e-4 * total + (draw.top_p < 1 ? 2e-4 : 0);
      possible = possible || behind >= 0;
      enclosed = enclosed || (behind >= 0 && before <= draw.uniform * total + slack &&
                              behind >= draw.uniform * total - slack);
    }
    EXPECT(possible && enclosed, "row %zu (k %d, p %g, min %g): token %d for the draw at %g", i, draw.top_k,
           draw.top_p, draw.min_p, found[i], draw.uniform);
  }
}

// The same seed gives the same numbers, and they are about normal with deviation 0.02.
CASE(DummyWeights) {
  const int64_t n = 1 << 20;
  const OnDevice<uint16_t> a(n), b(n), c(n);
  FillNormal(1, n, a.data(), nullptr);
  FillNormal(1, n, b.data(), nullptr);
  FillNormal(2, n, c.data(), nullptr);
  const std::vector<uint16_t> values = a.Get();
  EXPECT(values == b.Get() && values != c.Get(), "seeds");
  double sum = 0, squares = 0;
  for (const uint16_t value : values) {
    sum += Value(value);
    squares += Value(value) * Value(value);
  }
  EXPECT(std::abs(sum / n) < 1e-4 && std::abs(std::sqrt(squares / n) - 0.02) < 4e-4, "mean %g, deviation %g",
         sum / n, std::sqrt(squares / n));
}

}  // namespace
}  // namespace triaxial::cuda

int main(int argc, char** argv) { return triaxial::cuda::RunGpuCases(argc, argv); }
