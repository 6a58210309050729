// RMSNorm of rows, alone or of the sum of two: normed = weight * (x * rsqrt(mean(x^2) + eps)).
//
// One block a row and the row in registers, so x is read once. How a row is cut among threads depends on its size
// alone: a row's result is the same to the bit whatever else is in the batch. Values are rounded to their type where
// the torch reference rounds them: after the addition, after the norm and after the weight.
#include "vector.cuh"

namespace ember {

template <class T>
struct RmsNorm {
  const T* x;
  int64_t x_stride;
  const T* residual;  // null: no addition
  int64_t residual_stride;
  const T* weight;
  T* normed;  // [rows, dim]
  T* summed;  // [rows, dim]; null without residual
  int64_t dim;
  float inverse_dim, eps;
};

template <class T, int kVectors, bool kAdd>
__global__ void __launch_bounds__(512) rms_norm_kernel(const RmsNorm<T> op) {
  constexpr int kWidth = kWide<T>;
  const int64_t row = blockIdx.x;
  const int vectors = (int)(op.dim / kWidth);
  Vector<T, kWidth> x[kVectors], residual[kVectors], weight[kVectors];
  constexpr bool kWeightFirst = kVectors <= 2;  // as many registers as there are
#pragma unroll
  for (int i = 0; kWeightFirst && i < kVectors; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < vectors) weight[i] = load_vector<kWidth>(op.weight + at * kWidth);
  }
  wait_for_predecessor();
  let_successor_start();
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
    x[i] = load_vector<kWidth>(op.x + row * op.x_stride + at * kWidth);
    if (kAdd) residual[i] = load_vector<kWidth>(op.residual + row * op.residual_stride + at * kWidth);
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
    if (kAdd) {
      x[i] = add(residual[i], x[i]);
      store_vector(op.summed + row * op.dim + at * kWidth, x[i]);
    }
    squares += sum_of_squares(x[i]);
  }
  const float factor = rsqrtf(block_sum(squares) * op.inverse_dim + op.eps);
#pragma unroll
  for (int i = 0; i < kVectors; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
    if (!kWeightFirst) weight[i] = load_vector<kWidth>(op.weight + at * kWidth);
    store_vector(op.normed + row * op.dim + at * kWidth, normalize(x[i], factor, weight[i]));
  }
}

// For rows of any size and alignment; it reads them twice.
template <class T, bool kAdd>
__global__ void __launch_bounds__(256) rms_norm_any_kernel(const RmsNorm<T> op) {
  const int64_t row = blockIdx.x;
  wait_for_predecessor();
  let_successor_start();
  const T* x = op.x + row * op.x_stride;
  T* summed = op.summed + row * op.dim;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < op.dim; i += blockDim.x) {
    T value = x[i];
    if (kAdd) {
      value = from_float<T>(to_float(op.residual[row * op.residual_stride + i]) + to_float(value));
      summed[i] = value;
    }
    squares += to_float(value) * to_float(value);
  }
  const float factor = rsqrtf(block_sum(squares) * op.inverse_dim + op.eps);
  for (int64_t i = threadIdx.x; i < op.dim; i += blockDim.x) {
    const T rounded = from_float<T>(to_float(kAdd ? summed[i] : x[i]) * factor);
    op.normed[row * op.dim + i] = from_float<T>(to_float(op.weight[i]) * to_float(rounded));
  }
}

template <class T, bool kAdd>
int launch_rms_norm(const RmsNorm<T>& op, int64_t rows, cudaStream_t stream) {
  const int64_t vectors = op.dim / kWide<T>;
  const bool wide = op.dim % kWide<T> == 0 && vectors <= 2048 && aligned(op.x, op.x_stride) &&
                    aligned(op.residual, op.residual_stride) && aligned(op.weight, 0) && aligned(op.normed, 0) &&
                    aligned(op.summed, 0);
  const dim3 grid((unsigned)rows);
  const auto threads = [&](int each) { return dim3((unsigned)round_up(ceil_div(vectors, each), 32)); };
  if (!wide) return launch(rms_norm_any_kernel<T, kAdd>, grid, dim3(256), 0, stream, op);
  if (vectors <= 512) return launch(rms_norm_kernel<T, 1, kAdd>, grid, threads(1), 0, stream, op);
  if (vectors <= 1024) return launch(rms_norm_kernel<T, 2, kAdd>, grid, threads(2), 0, stream, op);
  return launch(rms_norm_kernel<T, 4, kAdd>, grid, threads(4), 0, stream, op);
}

}  // namespace ember

// x, residual: [rows, dim] with strides between rows, in elements; residual and summed null for a plain norm.
EMBER_API int ember_rms_norm(const void* x, int64_t x_stride, const void* residual, int64_t residual_stride,
                             const void* weight, void* normed, void* summed, int64_t rows, int64_t dim, float eps,
                             int64_t dtype, cudaStream_t stream) {
  EMBER_DISPATCH(dtype, {
    const ember::RmsNorm<scalar> op = {(const scalar*)x, x_stride, (const scalar*)residual, residual_stride,
                                       (const scalar*)weight, (scalar*)normed, (scalar*)summed, dim, 1.0f / (float)dim, eps};
    return residual ? ember::launch_rms_norm<scalar, true>(op, rows, stream)
                    : ember::launch_rms_norm<scalar, false>(op, rows, stream);
  })
  return 0;
}
