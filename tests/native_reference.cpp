// Compares a library of compiled kernels with loops that say what a dynamic conv is: for processors that the tests in
// Python don't run on. Run under an emulator, it needs neither Python nor torch.
//
//   c++ -O2 -std=c++17 -I dyconvert/nn/csrc tests/native_reference.cpp -ldl -o reference && ./reference LIBRARY
#include <dlfcn.h>

#include <cmath>
#include <cstdio>

#define DYCONVERT_TARGET reference
#define DYCONVERT_VECTOR 32
#define DYCONVERT_REGISTER 16
#define DYCONVERT_REGISTERS 16
#include "base/problem.h"

using namespace reference;

namespace {

int32_t in_order(int64_t begin, int64_t end, int64_t, DyconvertBody body, void* context) {
  body(begin, end, context);
  return 0;
}

uint64_t state = 1;
double uniform() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 11) / double(1ull << 52) - 1;
}
i64 below(i64 end) { return i64((uniform() + 1) / 2 * end) % end; }
template <typename T>
std::vector<T> random_values(i64 count) {
  std::vector<T> values(count);
  for (T& value : values) value = T(uniform());
  return values;
}

Shape random_shape(bool channels_last) {
  struct Channels { i64 groups, in, out; };
  const Channels kinds[] = {{1, 3, 5}, {1, 40, 33}, {1, 70, 56}, {2, 36, 40}, {22, 22, 44}, {32, 32, 32}};
  const i64 kernels[][2] = {{1, 1}, {3, 3}, {3, 3}, {5, 5}, {1, 4}};
  const Channels& c = kinds[below(6)];
  const i64* kernel = kernels[below(5)];
  Shape s{};
  s.images = 1 + below(3), s.in_channels = c.in, s.out_channels = c.out, s.groups = c.groups;
  s.kernel_height = kernel[0], s.kernel_width = kernel[1], s.g = 1 + below(4), s.threads = 1;
  const bool usual = below(2);
  s.stride_y = usual ? 1 : 1 + below(3), s.stride_x = usual ? 1 : 1 + below(3);
  s.dilation_y = usual ? 1 : 1 + below(2), s.dilation_x = 1;
  s.padding_y = usual ? kernel[0] / 2 : below(3), s.padding_x = usual ? kernel[1] / 2 : below(3);
  s.height = s.dilation_y * (kernel[0] - 1) + 1 + below(30);
  s.width = s.dilation_x * (kernel[1] - 1) + 1 + below(30);
  s.out_height = (s.height + 2 * s.padding_y - s.dilation_y * (kernel[0] - 1) - 1) / s.stride_y + 1;
  s.out_width = (s.width + 2 * s.padding_x - s.dilation_x * (kernel[1] - 1) - 1) / s.stride_x + 1;
  s.x_image = c.in * s.height * s.width;
  s.x_channel = channels_last ? 1 : s.height * s.width;
  s.x_row = channels_last ? s.width * c.in : s.width;
  s.x_column = channels_last ? c.in : 1;
  s.out_channel = channels_last ? 1 : s.pixels(), s.out_pixel = channels_last ? c.out : 1;
  const bool per_channel = below(2);
  s.factor_groups = below(2) ? 0 : below(2) ? c.groups : 1;
  s.eta_image = s.g * (per_channel ? c.out : 1), s.eta_expert = per_channel ? c.out : 1, s.eta_channel = per_channel;
  return s;
}

// f(image, output channel, output pixel, x's place, kernel's element): all the products of a conv.
template <typename F>
void each_product(const Shape& s, const F& f) {
  for (i64 n = 0; n < s.images; n++)
    for (i64 t = 0; t < s.out_channels; t++)
      for (i64 y = 0; y < s.out_height; y++)
        for (i64 x = 0; x < s.out_width; x++)
          for (i64 c = 0; c < s.group_in(); c++)
            for (i64 tap = 0; tap < s.taps(); tap++) {
              const i64 row = y * s.stride_y - s.padding_y + tap / s.kernel_width * s.dilation_y;
              const i64 column = x * s.stride_x - s.padding_x + tap % s.kernel_width * s.dilation_x;
              if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
              const i64 channel = t / s.group_out() * s.group_in() + c;
              f(n, t, y * s.out_width + x,
                n * s.x_image + channel * s.x_channel + row * s.x_row + column * s.x_column, c * s.taps() + tap);
            }
}

template <typename T>
double error(const std::vector<T>& found, const std::vector<double>& wanted) {
  double worst = 0, scale = 1;
  for (double value : wanted) scale = max(scale, std::fabs(value));
  for (size_t i = 0; i < wanted.size(); i++) {
    const double apart = std::fabs(double(found[i]) - wanted[i]);
    if (!(apart <= worst)) worst = apart;  // not a number is the worst
  }
  return worst / scale;
}

struct Library {
  void* at;
  template <typename F>
  F* function(const char* name) const {
    return reinterpret_cast<F*>(dlsym(at, name));
  }
};

template <typename T>
double run(const Library& library, DyconvertType type) {
  const bool last = below(4) == 0;
  const Shape s = random_shape(last);
  const i64 k = s.elements(), kernel = s.out_channels * k;
  const auto x = random_values<T>(s.images * s.x_image), bank = random_values<T>(s.g * kernel);
  const auto eta = random_values<T>(s.images * s.eta_image), bias = random_values<T>(s.g * s.out_channels);
  const auto eta_of = [&](i64 n, i64 i, i64 t) {
    return double(eta[n * s.eta_image + i * s.eta_expert + t * s.eta_channel]);
  };
  const bool with_factors = s.factor_groups > 0;
  const auto factors = random_values<T>(s.images * s.factor_groups * k);
  const auto factor_of = [&](i64 n, i64 t, i64 e) {
    return with_factors ? double(factors[s.factors_at(n, t) + e]) : 1;
  };
  std::vector<double> unscaled(s.images * kernel), mixed(s.images * kernel);
  std::vector<double> wanted(s.images * s.out_channels * s.pixels());
  for (i64 n = 0; n < s.images; n++)
    for (i64 t = 0; t < s.out_channels; t++) {
      for (i64 i = 0; i < s.g; i++) {
        for (i64 e = 0; e < k; e++) unscaled[n * kernel + t * k + e] += eta_of(n, i, t) * bank[i * kernel + t * k + e];
        for (i64 p = 0; p < s.pixels(); p++)
          wanted[n * s.out_channels * s.pixels() + t * s.out_channel + p * s.out_pixel] +=
              eta_of(n, i, t) * bias[i * s.out_channels + t];
      }
      for (i64 e = 0; e < k; e++)
        mixed[n * kernel + t * k + e] = unscaled[n * kernel + t * k + e] * factor_of(n, t, e);
    }
  each_product(s, [&](i64 n, i64 t, i64 pixel, i64 at, i64 e) {
    wanted[n * s.out_channels * s.pixels() + t * s.out_channel + pixel * s.out_pixel] +=
        mixed[n * kernel + t * k + e] * x[at];
  });
  std::vector<T> out(wanted.size());
  using Conv = int(const void*, DyconvertParallelFor, const void*, const void*, const void*, const void*, const void*,
                   const void*, const void*, const void*, void*, int, int);
  const void* given = with_factors ? factors.data() : nullptr;
  int failed = library.function<Conv>("dyconvert_conv")(&s, in_order, x.data(), bank.data(), nullptr, nullptr,
                                                        eta.data(), given, bias.data(), nullptr, out.data(), type,
                                                        type);
  double worst = failed ? NAN : error(out, wanted);
  if (last) return worst;  // no gradients
  const auto grad = random_values<T>(wanted.size());
  std::vector<double> grad_x(x.size()), grad_kernel(mixed.size()), grad_bank(bank.size()), grad_eta(eta.size()),
      grad_factors(factors.size());
  each_product(s, [&](i64 n, i64 t, i64 pixel, i64 at, i64 e) {
    const double g = grad[(n * s.out_channels + t) * s.pixels() + pixel];
    grad_x[at] += g * mixed[n * kernel + t * k + e];
    grad_kernel[n * kernel + t * k + e] += g * x[at];
  });
  for (i64 n = 0; n < s.images; n++)
    for (i64 i = 0; i < s.g; i++)
      for (i64 t = 0; t < s.out_channels; t++)
        for (i64 e = 0; e < k; e++) {
          const double own = grad_kernel[n * kernel + t * k + e] * factor_of(n, t, e);
          grad_bank[i * kernel + t * k + e] += eta_of(n, i, t) * own;
          grad_eta[n * s.eta_image + i * s.eta_expert + t * s.eta_channel] += bank[i * kernel + t * k + e] * own;
          if (with_factors && i == 0)
            grad_factors[s.factors_at(n, t) + e] +=
                unscaled[n * kernel + t * k + e] * grad_kernel[n * kernel + t * k + e];
        }
  std::vector<T> found_x(x.size()), found_bank(bank.size()), found_eta(eta.size()),
      found_factors(factors.size());
  using InputGradient = int(const void*, DyconvertParallelFor, const void*, const void*, const void*, const void*,
                            void*, int);
  using BankGradient = int(const void*, DyconvertParallelFor, const void*, const void*, const void*, const void*,
                           const void*, void*, void*, void*, int);
  failed = library.function<InputGradient>("dyconvert_input_gradient")(&s, in_order, grad.data(), bank.data(),
                                                                       eta.data(), given, found_x.data(), type);
  failed += library.function<BankGradient>("dyconvert_bank_gradient")(
      &s, in_order, grad.data(), x.data(), bank.data(), eta.data(), given, found_bank.data(), found_eta.data(),
      with_factors ? found_factors.data() : nullptr, type);
  worst = max(worst, failed ? NAN : error(found_x, grad_x));
  if (with_factors) worst = max(worst, error(found_factors, grad_factors));
  return max(max(worst, error(found_bank, grad_bank)), error(found_eta, grad_eta));
}

}  // namespace

int main(int count, char** arguments) {
  const Library library{count == 2 ? dlopen(arguments[1], RTLD_NOW) : nullptr};
  if (!library.at) return fprintf(stderr, "usage: reference LIBRARY; %s\n", count == 2 ? dlerror() : ""), 2;
  int wrong = 0;
  for (int target = 0;; target++) {
    const char* name = library.function<const char*(int)>("dyconvert_target_name")(target);
    if (!name) break;
    if (!library.function<int(int)>("dyconvert_target_runs_here")(target)) continue;
    library.function<void(int)>("dyconvert_use")(target);
    double worst[2] = {};
    for (int i = 0; i < 40; i++) {
      const int kind = i % 2;
      const double found = kind ? run<double>(library, kFloat64) : run<float>(library, kFloat32);
      if (!(found <= worst[kind])) worst[kind] = found;
    }
    // Winograd's filtering loses two digits in float32.
    const bool right = worst[0] < 1e-4 && worst[1] < 1e-12;
    wrong += !right;
    printf("%s: %s; the largest errors, relative: float32 %.1e, float64 %.1e\n", name, right ? "right" : "WRONG",
           worst[0], worst[1]);
  }
  return wrong;
}
