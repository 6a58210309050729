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
constexpr int kSteps = 4;                          // units of a row tile whose x a warp holds in registers
constexpr int kSegmentUnits = kWarps * kSteps;     // wider weights are walked through in segments
constexpr int kGroupTiles = 2;                     // row tiles whose sums a warp keeps until the width is through
constexpr int kSumPitch = 18;                      // floats between columns of a warp's sums

// One matrix product and what stands around it.
struct Problem {
  const void *x, *residual, *norm_weight, *weight, *bias;  // residual, norm_weight and bias may be null
  void *y, *residual_out;
  int rows, in, out;                   // out: columns of y, half the rows of a weight that holds gate and up
  int segments, segment_units;         // how the weight's width is walked through
  int share_rows, longer_shares;       // y's columns of a CTA, and how many CTAs have one more
  int tile_rows;                       // of these in a row tile, at most 16, or 8 with SwiGLU
  int swiglu;
  float eps;
  int early;  // tuning
  unsigned long long* trace;
};

// Products that follow one another in one launch.
constexpr int kMaxProblems = 4;
struct Chain {
  Problem problems[kMaxProblems];
  int count;
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

// Where all CTAs of a grid meet: each adds 1 and the first what is missing to half of the number range, so that the
// top bit turns when all are there and the other bits are as they were. Zero when the library is loaded.
__device__ unsigned int meeting;

__device__ __forceinline__ unsigned int arrive_at_grid() {  // by one thread, after a barrier of its CTA
  __threadfence();
  return atomicAdd(&meeting, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
}
__device__ __forceinline__ void wait_for_grid(unsigned int before) {
  unsigned int now;
  do {
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(&meeting) : "memory");
  } while (((before ^ now) & 0x80000000u) == 0);
}

// A warp's units of a row tile and segment. One that has none copies zeros.
__device__ __forceinline__ int steps_of(const Problem& p, int warp) {
  return max((p.segment_units - warp + kWarps - 1) / kWarps, 1);
}

// A CTA's walk over its rows of a problem: groups of row tiles, in a group segments of the width, in a segment the
// tiles.
struct Walk {
  int group, last;  // the group's first row; one past the CTA's last
  int segment, tile;

  __device__ __forceinline__ void start(const Problem& p) {
    group = blockIdx.x * p.share_rows + min((int)blockIdx.x, p.longer_shares);
    last = group + p.share_rows + ((int)blockIdx.x < p.longer_shares ? 1 : 0);
    segment = tile = 0;
  }
  __device__ __forceinline__ bool done() const { return group >= last; }
  // Whether the next tile is of the same group and segment.
  __device__ __forceinline__ bool next(const Problem& p) {
    if (++tile < kGroupTiles && group + tile * p.tile_rows < last) return true;
    tile = 0;
    if (++segment == p.segments) {
      segment = 0;
      group += kGroupTiles * p.tile_rows;
    }
    return false;
  }
};

template <class T, int kHalves, int kDepth>
struct Layout {
  static constexpr int kColumns = 8 * kHalves;
  static constexpr int kSumFloats = kColumns * kSumPitch;  // of one warp and row tile
  static constexpr int kRing = kWarps * kDepth * kUnitBytes;
  static constexpr int kSums = kGroupTiles * kWarps * kSumFloats * 4;
  static constexpr int kSquares = kWarps * kColumns * 4;
  static constexpr int kNorm = kWarps * kSteps * kUnit * 2;  // a warp's part of a norm's weight
  static constexpr int kFar = kThreads * kSteps * 2 * 16;  // x's rows 8 to 15
  static constexpr int kBytes = kRing + kSums + kSquares + 2 * kNorm + (kHalves - 1) * kFar;
};

// kHalves: x has up to 8 rows a half. kDepth: units of a warp's ring.
template <class T, int kHalves, int kDepth>
__global__ void __launch_bounds__(kThreads, 1) skinny_linear_kernel(const __grid_constant__ Chain chain) {
  using L = Layout<T, kHalves, kDepth>;
  extern __shared__ __align__(128) char shared[];
  float* sums = reinterpret_cast<float*>(shared + L::kRing);
  float* squares = reinterpret_cast<float*>(shared + L::kRing + L::kSums);
  char* norms = shared + L::kRing + L::kSums + L::kSquares;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lane_group = lane / 4, quad = lane % 4;
  uint4* far = reinterpret_cast<uint4*>(norms + 2 * L::kNorm) + warp * kSteps * 2 * 32 + lane;

  auto stamp = [&](const Problem& p, int i) {
    if (p.trace != nullptr && threadIdx.x == 0) {
      unsigned long long t;
      asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
      p.trace[blockIdx.x * 8 + i] = t;
    }
  };
  stamp(chain.problems[0], 0);
  if (chain.problems[0].early) let_successor_start();

  // The stream of weights. A lane copies 16 bytes of rows lane / 8 + 4 i of a unit; the upper 8 rows of a tile are
  // the up rows where W holds gate and up. Odd rows are stored with their halves exchanged: a quarter of a warp then
  // reads from all banks.
  const uint32_t ring = (uint32_t)__cvta_generic_to_shared(shared) + warp * kDepth * kUnitBytes;
  const int lane_row = lane / 8, piece = lane % 8;
  const uint32_t put = lane_row * 128 + ((piece ^ ((lane_row & 1) * 4)) * 16);
  int fetched = -1;  // the problem whose weights are on their way
  Walk ahead;
  ahead.group = ahead.last = 0;
  const char* source = nullptr;  // what this lane copies next of the rows lane_row, + 4, and the upper ones of both
  uint32_t four_rows = 0, upper = 0;
  int32_t tile_jump = 0;
  int column = 0, first_column = 0, limit = 0, rows_left = 0, upper_row = 0, step_ahead = 0, steps_ahead = 0;
  int tile_rows_ahead = 0;
  auto enter = [&] {  // a segment or group
    const Problem& p = chain.problems[fetched];
    first_column = (ahead.segment * p.segment_units + warp) * kUnit + piece * 8;
    limit = min((ahead.segment + 1) * p.segment_units * kUnit, p.in);
    column = first_column;
    rows_left = ahead.last - ahead.group;
    source = static_cast<const char*>(p.weight) + ((int64_t)(ahead.group + lane_row) * p.in + column) * 2;
  };
  auto enter_problem = [&] {
    while (ahead.done() && ++fetched < chain.count) {
      const Problem& p = chain.problems[fetched];
      ahead.start(p);
      four_rows = p.in * 8;
      upper = (uint32_t)p.in * 2 * (p.swiglu ? p.out : 8);
      upper_row = p.swiglu ? 0 : 8;
      steps_ahead = steps_of(p, warp);
      tile_rows_ahead = p.tile_rows;
      tile_jump = p.tile_rows * p.in * 2 - steps_ahead * kWarps * kUnit * 2;
      if (!ahead.done() && p.norm_weight != nullptr && p.segments == 1) {
        const int at = (lane / 8 * kWarps + warp) * kUnit + piece * 8;
        const uint32_t to = (uint32_t)__cvta_generic_to_shared(norms + fetched / 2 * L::kNorm);
        copy_async(to + (warp * kSteps * 8 + lane) * 16, static_cast<const T*>(p.norm_weight) + at, at < p.in);
      }
    }
    if (fetched < chain.count) enter();
  };
  uint32_t slot = 0;
  auto fetch = [&] {
    if (fetched < chain.count) {
      const int rows_here = column < limit ? min(tile_rows_ahead, rows_left) : 0;
      copy_async(ring + slot + put, source, lane_row < rows_here);
      copy_async(ring + slot + put + 512, source + four_rows, lane_row + 4 < rows_here);
      copy_async(ring + slot + put + 1024, source + upper, lane_row + upper_row < rows_here);
      copy_async(ring + slot + put + 1536, source + upper + four_rows, lane_row + upper_row + 4 < rows_here);
      source += kWarps * kUnit * 2;
      column += kWarps * kUnit;
      if (++step_ahead == steps_ahead) {
        step_ahead = 0;
        if (ahead.next(chain.problems[fetched])) {
          rows_left -= tile_rows_ahead;
          column = first_column;
          source += tile_jump;
        } else if (!ahead.done()) {
          enter();
        } else {
          stamp(chain.problems[fetched], 6);
          enter_problem();
          if (fetched == chain.count && !chain.problems[0].early) let_successor_start();
        }
      }
    }
    commit_copies();
    slot = slot + kUnitBytes == kDepth * kUnitBytes ? 0 : slot + kUnitBytes;
  };
  enter_problem();
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i) fetch();
  // `slot` has come round: it is the oldest unit's, and the next one's to fill once that is used up.

#pragma unroll 1
  for (int problem = 0; problem < chain.count; ++problem) {
  const Problem& p = chain.problems[problem];
  unsigned int before = 0;
  if (problem > 0) {
    __syncthreads();
    if (threadIdx.x == 0) before = arrive_at_grid();
  }
  const T* norm_weight = static_cast<const T*>(p.norm_weight);
  const char* near_norm = norms + problem / 2 * L::kNorm + warp * kSteps * kUnit * 2;
  stamp(p, 1);
  if (problem == 0) {
    wait_for_predecessor();
  } else {
    if (threadIdx.x == 0) wait_for_grid(before);
    __syncthreads();
  }
  stamp(p, 2);
  // x: a lane holds row `lane_group` and of each unit the pieces `quad` and `quad + 4`; of row `lane_group + 8` in
  // shared memory, in places of its own, for want of registers.
  uint4 held[kSteps][2];
  auto load_half = [&](int half, int segment) {
    const int start = (segment * p.segment_units + warp) * kUnit + quad * 8;
    const int end = half * 8 + lane_group < p.rows ? min((segment + 1) * p.segment_units * kUnit, p.in) : 0;
    const int64_t at = (int64_t)(half * 8 + lane_group) * p.in + start;
    const T* x = static_cast<const T*>(p.x) + at;
    const T* residual = static_cast<const T*>(p.residual) + at;
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j) {
      const int offset = j / 2 * kWarps * kUnit + j % 2 * 32;
      held[j / 2][j % 2] = load_if(x + offset, start + offset < end);
    }
    if (p.residual == nullptr) return;
    uint4 other[kSteps][2];
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j) {
      const int offset = j / 2 * kWarps * kUnit + j % 2 * 32;
      other[j / 2][j % 2] = load_if(residual + offset, start + offset < end);
    }
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j) held[j / 2][j % 2] = add4<T>(held[j / 2][j % 2], other[j / 2][j % 2]);
  };
  auto put_away = [&](int half) {
    if (half == 0) return;
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j) far[j * 32] = held[j / 2][j % 2];
  };
  auto load_x = [&](int segment) {
#pragma unroll
    for (int half = kHalves - 1; half >= 0; --half) {
      load_half(half, segment);
      put_away(half);
    }
  };
  float scale[kHalves];
  auto normalize = [&](int segment) {
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j) {
      const int unit = j / 2 * kWarps + warp, in_unit = (quad + 4 * (j % 2)) * 8;
      const int column = (segment * p.segment_units + unit) * kUnit + in_unit;
      if (unit < p.segment_units && column < p.in) {
        const uint4 w = p.segments == 1 ? *reinterpret_cast<const uint4*>(near_norm + (j / 2 * kUnit + in_unit) * 2)
                                        : __ldg(reinterpret_cast<const uint4*>(norm_weight + column));
        held[j / 2][j % 2] = scale4<T>(held[j / 2][j % 2], scale[0], w);
        if (kHalves == 2) far[j * 32] = scale4<T>(far[j * 32], scale[kHalves - 1], w);
      }
    }
  };
  if (norm_weight != nullptr) {
    float square[kHalves] = {};
#pragma unroll 1
    for (int segment = 0; segment < p.segments; ++segment) {
#pragma unroll
      for (int half = kHalves - 1; half >= 0; --half) {
        load_half(half, segment);
        put_away(half);
        const int row = half * 8 + lane_group;
#pragma unroll
        for (int j = 0; j < 2 * kSteps; ++j) {
          square[half] = squares4<T>(square[half], held[j / 2][j % 2]);
          const int unit = j / 2 * kWarps + warp;
          const int column = (segment * p.segment_units + unit) * kUnit + (quad + 4 * (j % 2)) * 8;
          if (blockIdx.x == 0 && p.residual_out != nullptr && row < p.rows && unit < p.segment_units &&
              column < p.in) {
            T* place = static_cast<T*>(p.residual_out) + (int64_t)row * p.in + column;
            *reinterpret_cast<uint4*>(place) = held[j / 2][j % 2];
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      square[half] += __shfl_xor_sync(~0u, square[half], 1);
      square[half] += __shfl_xor_sync(~0u, square[half], 2);
      if (quad == 0) squares[(half * 8 + lane_group) * kWarps + warp] = square[half];
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += squares[(half * 8 + lane_group) * kWarps + w];
      scale[half] = rsqrtf(total / p.in + p.eps);
    }
    wait_copies<kDepth - 1>();  // the norm's weight came with the first unit
    __syncwarp();
    stamp(p, 3);
  }

  // One thread makes one y (with SwiGLU one of two, of its gate in lanes 0 to 7 and 16 to 23).
  const int row = threadIdx.x % kTileRows, column = threadIdx.x / kTileRows % kTileRows;
  const int tile = threadIdx.x / (kTileRows * kTileRows);
  const int steps = steps_of(p, warp);
  T* y = static_cast<T*>(p.y) + (int64_t)column * p.out + tile * p.tile_rows + row;
  Walk at;
  at.start(p);
  int loaded = -1, stamped = 0;
#pragma unroll 1
  while (!at.done()) {
    const int group = at.group, rows_here = at.last - at.group;
    float c[kGroupTiles][kHalves][4] = {};
#pragma unroll 1
    for (int segment = 0; segment < p.segments; ++segment) {
      if (loaded != segment) {
        if (norm_weight == nullptr || p.segments > 1) load_x(segment);
        if (norm_weight != nullptr) normalize(segment);
        if (loaded < 0) stamp(p, 4);
        loaded = segment;
      }
#pragma unroll
      for (int t = 0; t < kGroupTiles; ++t) {
        if (t == 0 || t * p.tile_rows < rows_here) {
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            if (step < steps) {
              wait_copies<kDepth - 1>();
              __syncwarp();
              uint4 w[2][2];
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const uint32_t from = ring + slot + lane_group * 128 + (((quad + 4 * i) ^ ((lane_group & 1) * 4)) * 16);
                w[i][0] = load_shared(from);
                w[i][1] = load_shared(from + 8 * 128);
              }
#pragma unroll
              for (int half = 0; half < kHalves; ++half) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  const uint4 x = half == 0 ? held[step][i] : far[(step * 2 + i) * 32];
                  Pair<T>::mma(c[t][half], w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y, x.x, x.y);
                  Pair<T>::mma(c[t][half], w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w, x.z, x.w);
                }
              }
              __syncwarp();
              fetch();
            }
          }
        }
      }
    }
    at.group += kGroupTiles * p.tile_rows;

    __syncthreads();  // the sums of the group before have been read
#pragma unroll
    for (int t = 0; t < kGroupTiles; ++t) {
      float* mine = sums + (t * kWarps + warp) * L::kSumFloats;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = half * 8 + quad * 2 + (i & 1);
          if (column < p.rows) mine[column * kSumPitch + lane_group + (i / 2) * 8] = c[t][half][i];
        }
      }
    }
    __syncthreads();
    if (stamped++ == 0) stamp(p, 5);
    if (column < p.rows || p.swiglu) {
      float v = 0;
      if (column < p.rows) {
        const float* all = sums + tile * kWarps * L::kSumFloats + column * kSumPitch + row;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) v += all[w * L::kSumFloats];
      }
      const int y_row = tile * p.tile_rows + row;
      const bool mine = column < p.rows && row < p.tile_rows && y_row < rows_here;
      if (p.swiglu) {
        const float up = to_float(from_float<T>(__shfl_down_sync(~0u, v, 8)));
        const float gate = to_float(from_float<T>(v));
        const float silu = to_float(from_float<T>(gate / (1.0f + expf(-gate))));
        if (mine && row < 8) y[group] = from_float<T>(silu * up);
      } else if (mine) {
        if (p.bias != nullptr) v += to_float(static_cast<const T*>(p.bias)[group + y_row]);
        y[group] = from_float<T>(v);
      }
    }
  }
  stamp(p, 7);
  }
}

}  // namespace ember::skinny
