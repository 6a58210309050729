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
constexpr int kBlockTiles = 4;                      // row tiles that share one reading of x's segments
constexpr int kSumPitch = 20;                      // floats between columns of a warp's sums: no bank is hit twice

// One matrix product and what stands around it.
struct Problem {
  const void *x, *residual, *norm_weight, *weight, *bias;  // residual, norm_weight and bias may be null
  void *y, *residual_out;
  int rows, in, out;                   // out: columns of y, half the rows of a weight that holds gate and up
  int segments, segment_units, steps;  // how the weight's width is walked through
  int cluster;                         // CTAs that share the segments of the same rows: 1 or segments
  int share_rows, longer_shares;       // rows of W of a CTA or cluster, and how many have one more
  int tile_rows, block_rows;
  int swiglu;
  float eps;
  int tiles_per_block;
  int early, beyond;  // tuning
  unsigned long long* trace;
};

// Products that follow one another in one launch.
constexpr int kMaxProblems = 4;
struct Chain {
  Problem problems[kMaxProblems];
  int count;
  const char* after;  // what is read after this launch, to be brought into the L2 cache, or null
  int64_t after_bytes;
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
__device__ __forceinline__ void prefetch_into_l2(const void* global, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
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

// Clusters (compute capability 9.0): CTAs that meet, and read one another's shared memory.
__device__ __forceinline__ void meet_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
__device__ __forceinline__ float load_of_rank(const float* shared, int rank) {
  float v = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"((uint32_t)__cvta_generic_to_shared(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
#endif
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

// A CTA's walk over its rows of a problem: blocks of row tiles, in a block segments of the width, in a segment the
// tiles, in a tile a warp's units.
struct Walk {
  int block, last;  // the block's first row; one past the CTA's last
  int segment, tile, step;
  int rank;

  __device__ __forceinline__ void start(const Problem& p) {
    rank = p.cluster == 1 ? 0 : blockIdx.x % p.cluster;
    const int share = p.cluster == 1 ? blockIdx.x : blockIdx.x / p.cluster;
    block = share * p.share_rows + min(share, p.longer_shares);
    last = block + p.share_rows + (share < p.longer_shares ? 1 : 0);
    segment = tile = step = 0;
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
    if (++segment * p.cluster >= p.segments) {
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
  static constexpr int kBytes = kRing + kSums + kKept + kSquares + 2 * kNorm;
};

// kHalves: x has up to 8 rows a half. kDepth: units of a warp's ring.
template <class T, int kHalves, int kDepth>
__global__ void __launch_bounds__(kThreads, 1) skinny_linear_kernel(const __grid_constant__ Chain chain) {
  using L = Layout<T, kHalves, kDepth>;
  extern __shared__ __align__(128) char shared[];
  float* sums = reinterpret_cast<float*>(shared + L::kRing);
  float* kept = reinterpret_cast<float*>(shared + L::kRing + L::kSums);
  float* squares = reinterpret_cast<float*>(shared + L::kRing + L::kSums + L::kKept);
  char* norms = shared + L::kRing + L::kSums + L::kKept + L::kSquares;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;

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
  ahead.block = ahead.last = 0;
  const char* source = nullptr;  // what this lane copies next of the rows lane_row, + 4, and the upper ones of both
  uint32_t four_rows = 0, upper = 0, tile_jump = 0;
  int column = 0, first_column = 0, limit = 0, row_ahead = 0, upper_row = 0;
  auto enter = [&] {  // a problem, segment or block
    const Problem& p = chain.problems[fetched];
    first_column = ((ahead.rank + ahead.segment) * p.segment_units + warp) * kUnit + piece * 8;
    limit = min((ahead.rank + ahead.segment + 1) * p.segment_units * kUnit, p.in);
    column = first_column;
    row_ahead = ahead.block;
    source = static_cast<const char*>(p.weight) + ((int64_t)(row_ahead + lane_row) * p.in + column) * 2;
  };
  auto enter_problem = [&] {
    while (ahead.done() && ++fetched < chain.count) {
      const Problem& p = chain.problems[fetched];
      ahead.start(p);
      four_rows = p.in * 8;
      upper = (uint32_t)p.in * 2 * (p.swiglu ? p.out : 8);
      upper_row = p.swiglu ? 0 : 8;
      tile_jump = (uint32_t)p.tile_rows * p.in * 2 - p.steps * kWarps * kUnit * 2;
      if (!ahead.done() && p.norm_weight != nullptr && p.segments == 1) {
        const int at = (lane / 8 * kWarps + warp) * kUnit + piece * 8;
        if (lane < 8 * kSteps) {
          const uint32_t to = (uint32_t)__cvta_generic_to_shared(norms + fetched / 2 * L::kNorm);
          copy_async(to + (warp * kSteps * 8 + lane) * 16, static_cast<const T*>(p.norm_weight) + at, at < p.in);
        }
      }
    }
    if (fetched < chain.count) enter();
  };
  uint32_t slot = 0;
  auto fetch = [&] {
    if (fetched < chain.count) {
      const Problem& p = chain.problems[fetched];
      const int rows_here = column < limit ? min(p.tile_rows, ahead.last - row_ahead) : 0;
      copy_async(ring + slot + put, source, lane_row < rows_here);
      copy_async(ring + slot + put + 512, source + four_rows, lane_row + 4 < rows_here);
      copy_async(ring + slot + put + 1024, source + upper, lane_row + upper_row < rows_here);
      copy_async(ring + slot + put + 1536, source + upper + four_rows, lane_row + upper_row + 4 < rows_here);
      source += kWarps * kUnit * 2;
      column += kWarps * kUnit;
      const int block = ahead.block, segment = ahead.segment, tile = ahead.tile;
      ahead.next(p);
      if (ahead.tile > tile) {
        row_ahead += p.tile_rows;
        column = first_column;
        source += (int32_t)tile_jump;
      } else if (ahead.step == 0) {
        if (ahead.done()) {
          stamp(p, 6);
          enter_problem();
          if (fetched == chain.count) {
            if (chain.after != nullptr && threadIdx.x == 0) {
              constexpr int kChunk = 8192;
              for (int64_t at = (int64_t)blockIdx.x * kChunk; at < chain.after_bytes; at += (int64_t)gridDim.x * kChunk) {
                prefetch_into_l2(chain.after + at, (int)min(chain.after_bytes - at, (int64_t)kChunk));
              }
            }
            if (!chain.problems[0].early) let_successor_start();
          }
        } else if (ahead.segment != segment || ahead.block != block) {
          enter();
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

  int turn = 0;
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
  // x: a lane holds rows `group` and `group + 8`, and of each unit the pieces `quad` and `quad + 4`.
  uint4 held[kHalves][kSteps][2];
  // What comes after the ring's content goes into the L2 cache behind the loads of x, so that the memory has work
  // until these are there and the stream goes on.
  bool went_beyond = false;
  auto go_beyond = [&] {
    if (went_beyond) return;
    went_beyond = true;
    Walk here;
    here.start(p);
    if (threadIdx.x < p.beyond * kTileRows) {
      const int part = kDepth / p.steps + threadIdx.x / kTileRows, row = threadIdx.x % kTileRows;
      const int segment = part / p.tiles_per_block, tile = part % p.tiles_per_block;
      const int in_tile = p.swiglu ? row % 8 : row;
      const int y_row = here.block + tile * p.tile_rows + in_tile;
      if (segment * p.cluster < p.segments && in_tile < p.tile_rows && y_row < here.last) {
        const int column = (here.rank + segment) * p.segment_units * kUnit;
        const int64_t weight_row = y_row + (p.swiglu && row >= 8 ? p.out : 0);
        prefetch_into_l2(static_cast<const T*>(p.weight) + weight_row * p.in + column,
                         min(p.segment_units * kUnit, p.in - column) * 2);
      }
    }
  };
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
    if (residual == nullptr) {
      go_beyond();
      return;
    }
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
        go_beyond();
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
    stamp(p, 3);
  }

  // One thread makes one y (with SwiGLU one of two, of its gate in lanes 0 to 7 and 16 to 23).
  const int row = threadIdx.x % kTileRows, column = threadIdx.x / kTileRows;
  Walk at;
  at.start(p);
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
      if (norm_weight == nullptr || p.segments > 1) load_x(at.rank + at.segment);
      if (norm_weight != nullptr) normalize(at.rank + at.segment);
      if (loaded < 0) stamp(p, 4);
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
    if (at.tile == 0 && at.segment == 0) stamp(p, 5);
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
      if (p.cluster > 1) meet_cluster();
      for (int tile = at.rank; tile < count; tile += p.cluster) {
        float v = 0;
        if (column < L::kColumns) {
          const float* parts = kept + (tile * L::kColumns + column) * kTileRows + row;
          v = p.cluster == 1 ? *parts : load_of_rank(parts, 0);
          for (int other = 1; other < p.cluster; ++other) v += load_of_rank(parts, other);
        }
        const int begin = block + tile * p.tile_rows;
        emit(begin, min(begin + p.tile_rows, at.last), v);
      }
      if (p.cluster > 1) meet_cluster();  // nobody leaves or goes on while others read here
    }
  }
  stamp(p, 7);
  }
}

}  // namespace ember::skinny
