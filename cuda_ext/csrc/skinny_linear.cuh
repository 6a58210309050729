// y = x W^T for 1 to 16 rows of x: a stream of weights with a little arithmetic on the side.
//
// The weight's rows are the 16-row operand of mma.m16n8k16 and x's rows its columns, so that any number of rows up to
// 16 costs the same weight traffic. A warp owns the same columns of W in every row tile: its part of x stays in
// registers for the whole kernel, and its weights come through a ring in shared memory that no other warp touches, so
// the stream needs no barrier. The warps' sums meet once a row tile, in a fixed order.
//
// The order of additions behind one y depends on the width of W alone: not on how many rows x has, on where a row
// stands in a tile, or on the GPU.
#pragma once

#include "common.cuh"

namespace ember::skinny {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16;
constexpr int kUnit = 64;                          // columns of W that a warp takes at a time: 128 bytes of a row
constexpr int kUnitBytes = kTileRows * kUnit * 2;  // of one row tile
constexpr int kSteps = 3;                          // units of a row tile whose x a warp holds in registers
constexpr int kSegmentUnits = kWarps * kSteps;     // wider weights are walked through in segments
constexpr int kBlockTiles = 4;                     // row tiles that share one reading of x's segments
constexpr int kSumPitch = 20;                      // floats between columns of a warp's sums: no bank is hit twice

struct Problem {
  const void *x, *residual, *norm_weight, *weight, *bias;  // residual, norm_weight and bias may be null
  void *y, *residual_out;
  int rows, in, out;                   // out: columns of y, half the rows of a weight that holds gate and up
  int swiglu;
  float eps;
  int segments, segment_units, steps;  // how the weight's width is walked through
  int share_rows, longer_shares;       // y's columns of a CTA, and how many CTAs have one more
  int tile_rows, block_rows;           // of these in a row tile, at most 16, or 8 with SwiGLU; in a block
};

template <class T>
struct Pair;
template <>
struct Pair<bf16> {
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  }
  static __device__ __forceinline__ uint32_t pack(float2 values) {
    __nv_bfloat162 pair = __float22bfloat162_rn(values);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    const __nv_bfloat162 sum =
        __hadd2_rn(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(sum);
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    const __nv_bfloat162 product =
        __hmul2_rn(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(product);
  }
  // c += A B with A 16x16, B 16x8 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
  static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};
template <>
struct Pair<fp16> {
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
  static __device__ __forceinline__ uint32_t pack(float2 values) {
    __half2 pair = __float22half2_rn(values);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
    const __half2 sum = __hadd2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(sum);
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
    const __half2 product = __hmul2_rn(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(product);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

// Four pairs of x as they go: x + residual rounded to T; the same times the row's 1/rms, rounded, times the norm's
// weight, rounded (the roundings of cuda_ext/rms_norm.py: a sum or product of two T rounded at once is the float32
// one rounded to T).
template <class T>
__device__ __forceinline__ uint4 add4(uint4 a, uint4 b) {
  return make_uint4(Pair<T>::add(a.x, b.x), Pair<T>::add(a.y, b.y), Pair<T>::add(a.z, b.z), Pair<T>::add(a.w, b.w));
}
template <class T>
__device__ __forceinline__ float squares4(float sum, uint4 a) {
  const uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = Pair<T>::unpack(pairs[i]);
    sum = fmaf(v.y, v.y, fmaf(v.x, v.x, sum));
  }
  return sum;
}
template <class T>
__device__ __forceinline__ uint4 scale4(uint4 a, float scale, uint4 weight) {
  auto one = [scale](uint32_t x, uint32_t w) {
    const float2 v = Pair<T>::unpack(x);
    return Pair<T>::multiply(Pair<T>::pack(make_float2(v.x * scale, v.y * scale)), w);
  };
  return make_uint4(one(a.x, weight.x), one(a.y, weight.y), one(a.z, weight.z), one(a.w, weight.w));
}

// 16 bytes from global to shared memory; zeros where `valid` is false.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// 16 bytes past the L1 cache, which may hold what stood there before the predecessor wrote; zeros where not `valid`.
// The loads of a sequence are under way together: there is no branch between them.
__device__ __forceinline__ uint4 load_if(const void* global, bool valid) {
  uint4 v = make_uint4(0, 0, 0, 0);
  asm volatile(
      "{ .reg .pred valid; setp.ne.s32 valid, %5, 0; @valid ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4]; }"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(global), "r"((int)valid)
      : "memory");
  return v;
}

// A CTA's walk over its rows: blocks of row tiles, in a block segments of the width, in a segment the tiles, in a tile
// a warp's units.
struct Walk {
  int block, last;  // the block's first row; one past the CTA's last
  int segment = 0, tile = 0, step = 0;

  __device__ __forceinline__ explicit Walk(const Problem& p) {
    block = blockIdx.x * p.share_rows + min((int)blockIdx.x, p.longer_shares);
    last = block + p.share_rows + ((int)blockIdx.x < p.longer_shares ? 1 : 0);
  }
  __device__ __forceinline__ bool done() const { return block >= last; }
  __device__ __forceinline__ int row(const Problem& p) const { return block + tile * p.tile_rows; }
  __device__ __forceinline__ int end(const Problem& p) const { return min(row(p) + p.tile_rows, last); }
  __device__ __forceinline__ void next(const Problem& p) {
    if (++step < p.steps) return;
    step = 0;
    const int end = min(block + p.block_rows, last);
    ++tile;
    if (row(p) < end) return;
    tile = 0;
    if (++segment == p.segments) {
      segment = 0;
      block = end;
    }
  }
};

template <class T, int kHalves, int kDepth>
struct Layout {
  static constexpr int kColumns = 8 * kHalves;
  static constexpr int kSumFloats = kColumns * kSumPitch;  // of one warp and row tile
  static constexpr int kRing = kWarps * kDepth * kUnitBytes;
  static constexpr int kSums = 2 * kWarps * kSumFloats * 4;
  static constexpr int kKept = kBlockTiles * kTileRows * kColumns * 4;
  static constexpr int kSquares = kWarps * kColumns * 4;
  static constexpr int kNorm = kWarps * kSteps * kUnit * 2;  // a warp's part of a norm's weight
  static constexpr int kBytes = kRing + kSums + kKept + kSquares + kNorm;
};

constexpr int kSmallDepth = 2;  // of GPUs with 99 KiB of shared memory

// kHalves: x has up to 8 rows a half. kDepth: units of a warp's ring.
template <class T, int kHalves, int kDepth>
__global__ void __launch_bounds__(kThreads, 1) skinny_linear_kernel(const __grid_constant__ Problem p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (kDepth > kSmallDepth) return;  // not started there: the GPU has not the shared memory
#endif
  using L = Layout<T, kHalves, kDepth>;
  extern __shared__ __align__(128) char shared[];
  float* sums = reinterpret_cast<float*>(shared + L::kRing);
  float* kept = reinterpret_cast<float*>(shared + L::kRing + L::kSums);
  float* squares = reinterpret_cast<float*>(shared + L::kRing + L::kSums + L::kKept);
  char* norms = shared + L::kRing + L::kSums + L::kKept + L::kSquares;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;

  let_successor_start();

  // The stream of weights. A lane copies 16 bytes of rows lane / 8 + 4 i of a unit; the upper 8 rows of a tile are
  // the up rows where W holds gate and up. Odd rows are stored with their halves exchanged: a quarter of a warp then
  // reads from all banks.
  const uint32_t ring = (uint32_t)__cvta_generic_to_shared(shared) + warp * kDepth * kUnitBytes;
  const int lane_row = lane / 8, piece = lane % 8;
  const uint32_t put = lane_row * 128 + ((piece ^ ((lane_row & 1) * 4)) * 16);
  const char* source = nullptr;  // what this lane copies next of the rows lane_row, + 4, and the upper ones of both
  const uint32_t four_rows = p.in * 8, upper = (uint32_t)p.in * 2 * (p.swiglu ? p.out : 8);
  const int32_t tile_jump = p.tile_rows * p.in * 2 - p.steps * kWarps * kUnit * 2;
  const int upper_row = p.swiglu ? 0 : 8;
  int column_ahead = 0, first_column = 0, limit = 0, row_ahead = 0;
  Walk ahead(p);
  auto enter = [&] {  // a segment or block
    first_column = (ahead.segment * p.segment_units + warp) * kUnit + piece * 8;
    limit = min((ahead.segment + 1) * p.segment_units * kUnit, p.in);
    column_ahead = first_column;
    row_ahead = ahead.block;
    source = static_cast<const char*>(p.weight) + ((int64_t)(row_ahead + lane_row) * p.in + first_column) * 2;
  };
  uint32_t slot = 0;
  auto fetch = [&] {
    if (!ahead.done()) {
      const int rows_here = column_ahead < limit ? min(p.tile_rows, ahead.last - row_ahead) : 0;
      copy_async(ring + slot + put, source, lane_row < rows_here);
      copy_async(ring + slot + put + 512, source + four_rows, lane_row + 4 < rows_here);
      copy_async(ring + slot + put + 1024, source + upper, lane_row + upper_row < rows_here);
      copy_async(ring + slot + put + 1536, source + upper + four_rows, lane_row + upper_row + 4 < rows_here);
      source += kWarps * kUnit * 2;
      column_ahead += kWarps * kUnit;
      const int tile = ahead.tile;
      ahead.next(p);
      if (ahead.tile > tile) {
        row_ahead += p.tile_rows;
        column_ahead = first_column;
        source += tile_jump;
      } else if (ahead.step == 0) {
        enter();
      }
    }
    commit_copies();
    slot = slot + kUnitBytes == kDepth * kUnitBytes ? 0 : slot + kUnitBytes;
  };
  const T* norm_weight = static_cast<const T*>(p.norm_weight);
  if (norm_weight != nullptr && p.segments == 1 && lane < 8 * kSteps) {  // with the first unit
    const int at = (lane / 8 * kWarps + warp) * kUnit + piece * 8;
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(norms) + (warp * kSteps * 8 + lane) * 16;
    copy_async(to, norm_weight + at, at < p.in);
  }
  enter();
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i) fetch();
  // `slot` has come round: it is the oldest unit's, and the next one's to fill once that is used up.

  int turn = 0;
  const char* near_norm = norms + warp * kSteps * kUnit * 2;
  wait_for_predecessor();

  // x: a lane holds rows `group` and `group + 8`, and of each unit the pieces `quad` and `quad + 4`.
  uint4 held[kHalves][kSteps][2];
  auto load_x = [&](int segment) {
    const T* x = static_cast<const T*>(p.x);
    const T* residual = static_cast<const T*>(p.residual);
    const int start = (segment * p.segment_units + warp) * kUnit + quad * 8;
    const int end = min((segment + 1) * p.segment_units * kUnit, p.in);
    auto fits = [&](int half, int step, int i, int64_t& at) {
      const int offset = step * kWarps * kUnit + i * 32;
      at = (int64_t)(half * 8 + group) * p.in + start + offset;
      return half * 8 + group < p.rows && start + offset < end;
    };
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int64_t at;
          const bool valid = fits(half, step, i, at);
          held[half][step][i] = load_if(x + at, valid);
        }
      }
    }
    if (residual == nullptr) return;
    constexpr int kBatch = kHalves == 1 ? kSteps : 2;  // as many loads under way as there are registers
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int from = 0; from < kSteps; from += kBatch) {
        uint4 other[kBatch][2];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            int64_t at;
            if (from + j < kSteps) {
              const bool valid = fits(half, from + j, i, at);
              other[j][i] = load_if(residual + at, valid);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (from + j < kSteps) held[half][from + j][i] = add4<T>(held[half][from + j][i], other[j][i]);
          }
        }
      }
    }
  };
  float scale[kHalves];
  auto normalize = [&](int segment) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int unit = step * kWarps + warp;
        const int column = (segment * p.segment_units + unit) * kUnit + (quad + 4 * i) * 8;
        if (unit < p.segment_units && column < p.in) {
          const uint4 w = p.segments == 1
                              ? *reinterpret_cast<const uint4*>(near_norm + step * kUnit * 2 + (quad + 4 * i) * 16)
                              : __ldg(reinterpret_cast<const uint4*>(norm_weight + column));
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            held[half][step][i] = scale4<T>(held[half][step][i], scale[half], w);
          }
        }
      }
    }
  };
  if (norm_weight != nullptr) {
    float square[kHalves] = {};
#pragma unroll 1
    for (int segment = 0; segment < p.segments; ++segment) {
      load_x(segment);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            square[half] = squares4<T>(square[half], held[half][step][i]);
            const int unit = step * kWarps + warp, row = half * 8 + group;
            const int column = (segment * p.segment_units + unit) * kUnit + (quad + 4 * i) * 8;
            if (blockIdx.x == 0 && p.residual_out != nullptr && row < p.rows && unit < p.segment_units &&
                column < p.in) {
              T* place = static_cast<T*>(p.residual_out) + (int64_t)row * p.in + column;
              *reinterpret_cast<uint4*>(place) = held[half][step][i];
            }
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      square[half] += __shfl_xor_sync(~0u, square[half], 1);
      square[half] += __shfl_xor_sync(~0u, square[half], 2);
      if (quad == 0) squares[(half * 8 + group) * kWarps + warp] = square[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += squares[(half * 8 + group) * kWarps + w];
      scale[half] = rsqrtf(total / p.in + p.eps);
    }
    wait_copies<kDepth - 1>();  // the norm's weight came with the first unit
    __syncwarp();
  }

  // One thread makes one y (with SwiGLU one of two, of its gate in lanes 0 to 7 and 16 to 23).
  const int row = threadIdx.x % kTileRows, column = threadIdx.x / kTileRows;
  Walk at(p);
  auto emit = [&](int begin, int end, float v) {
    T* y = static_cast<T*>(p.y) + (int64_t)column * p.out + begin + row;
    const bool mine = column < p.rows && begin + row < end;
    if (p.swiglu) {
      const float up = to_float(from_float<T>(__shfl_down_sync(~0u, v, 8)));
      const float gate = to_float(from_float<T>(v));
      const float silu = to_float(from_float<T>(gate / (1.0f + expf(-gate))));
      if (mine && row < 8) *y = from_float<T>(silu * up);
    } else if (mine) {
      if (p.bias != nullptr) v += to_float(static_cast<const T*>(p.bias)[begin + row]);
      *y = from_float<T>(v);
    }
  };

  int loaded = -1;
#pragma unroll 1
  while (!at.done()) {
    if (loaded != at.segment) {
      if (norm_weight == nullptr || p.segments > 1) load_x(at.segment);
      if (norm_weight != nullptr) normalize(at.segment);
      loaded = at.segment;
    }
    float c[kHalves][2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step < p.steps) {
        wait_copies<kDepth - 1>();
        __syncwarp();
        uint4 w[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t from = ring + slot + group * 128 + (((quad + 4 * i) ^ ((group & 1) * 4)) * 16);
          w[i][0] = load_shared(from);
          w[i][1] = load_shared(from + 8 * 128);
        }
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint4 x = held[half][step][i];
            Pair<T>::mma(c[half][i], w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y, x.x, x.y);
            Pair<T>::mma(c[half][i], w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w, x.z, x.w);
          }
        }
        __syncwarp();
        fetch();
      }
    }

    float* mine = sums + (turn * kWarps + warp) * L::kSumFloats;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mine[(half * 8 + quad * 2 + (i & 1)) * kSumPitch + group + (i / 2) * 8] = c[half][0][i] + c[half][1][i];
      }
    }
    __syncthreads();
    float v = 0;
    if (column < L::kColumns) {
      const float* all = sums + turn * kWarps * L::kSumFloats + column * kSumPitch + row;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) v += all[w * L::kSumFloats];
    }
    turn ^= 1;
    if (p.segments == 1) {
      emit(at.row(p), at.end(p), v);
    } else if (column < L::kColumns) {
      float& before = kept[(at.tile * L::kColumns + column) * kTileRows + row];
      before = at.segment == 0 ? v : before + v;
    }
    const int block = at.block, count = at.tile + 1;
    at.step = p.steps - 1;
    at.next(p);
    if (p.segments > 1 && at.block != block) {  // all segments are through: add them up in their order
      for (int tile = 0; tile < count; ++tile) {
        const int begin = block + tile * p.tile_rows;
        emit(begin, min(begin + p.tile_rows, at.last),
             column < L::kColumns ? kept[(tile * L::kColumns + column) * kTileRows + row] : 0.0f);
      }
    }
  }
}

}  // namespace ember::skinny
