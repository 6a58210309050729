// Prefill attention, the side that computes: two warpgroups of 64 query rows each.
#pragma once

#include <math.h>

#include <type_traits>

#include "hopper_products.cuh"
#include "prefill_attention_load.cuh"


namespace ember::prefill {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A thread of a warpgroup holds two rows of a tile of scores: value 4 j + 2 r + e is row r (8 apart), column
// 8 j + 2 (lane % 4) + e.
struct Softmax {
  // How far, in powers of 2, scores may exceed `top` before it rises: weights up to 2^kSlack are as exact as those up
  // to 1, and what was summed before needs no new factor (FlashAttention-4 rescales by such a threshold).
  static constexpr float kSlack = 8;

  float top[2], total[2];  // top: of the scores, or up to kSlack less; total: of this thread's columns only

  __device__ __forceinline__ void reset() {
    top[0] = top[1] = -1e38f;
    total[0] = total[1] = 0;
  }

  // Scores become weights. Returns in `fade` what earlier results must be multiplied by, and whether that differs from
  // 1 in any row of the warp.
  template <bool kMasked>
  __device__ __forceinline__ bool step(float (&s)[64], float scale_log2, int last_column, float (&fade)[2]) {
    if (kMasked) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int column = i / 4 * 8 + (i & 1), row = i >> 1 & 1;
        if (column > last_column + row * 8) s[i] = -INFINITY;
      }
    }
    float most[2][2], sum[2][2], shift[2];
#pragma unroll
    for (int i = 0; i < 64; ++i) {  // several chains side by side: one warp has the scheduler to itself
      float& chain = most[i >> 1 & 1][i & 1];
      chain = i < 4 ? s[i] : fmaxf(chain, s[i]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) most[r][0] = fmaxf(most[r][0], most[r][1]);
#pragma unroll
    for (int step = 1; step <= 2; step *= 2)
#pragma unroll
      for (int r = 0; r < 2; ++r) most[r][0] = fmaxf(most[r][0], __shfl_xor_sync(~0u, most[r][0], step));
    bool rises[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float beyond = (most[r][0] - top[r]) * scale_log2;
      rises[r] = beyond > kSlack;
      fade[r] = rises[r] ? exp2_fast(-beyond) : 1;
      top[r] = rises[r] ? most[r][0] : top[r];
      shift[r] = top[r] * scale_log2;
    }
    const bool any_rises = __any_sync(~0u, rises[0] || rises[1]);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int r = i >> 1 & 1, chain = i & 1;
      s[i] = exp2_fast(s[i] * scale_log2 - shift[r]);
      sum[r][chain] = i < 4 ? s[i] : sum[r][chain] + s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) total[r] = total[r] * fade[r] + (sum[r][0] + sum[r][1]);
    return any_rises;
  }
};

// Divides by the sum of weights and writes [64, D] of this warpgroup. Each warp turns its own 16 rows through shared
// memory, for stores of whole rows.
template <class T, int D>
__device__ __forceinline__ void write_out(const Params& params, Shared<D>& shared, const Work& work,
                                          const float (&total)[2], const float (&o)[D / 2]) {
  const int first = (threadIdx.x / 32 - 4) * 16, lane = threadIdx.x % 32;
  float share[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = total[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    share[r] = __fdividef(1, sum);
  }
  uint8_t* own = shared.out + first * D * 2;
  const int at = lane % 8 + lane / 8 % 2 * 8;
  const uint32_t base = shared_address(own) + at * D * 2;
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    const float* x = o + 8 * j;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     base + (((2 * j + lane / 16) ^ (at & 7)) << 4)),
                 "r"(pack(T(), x[0] * share[0], x[1] * share[0])), "r"(pack(T(), x[2] * share[1], x[3] * share[1])),
                 "r"(pack(T(), x[4] * share[0], x[5] * share[0])), "r"(pack(T(), x[6] * share[1], x[7] * share[1]))
                 : "memory");
  }
  __syncwarp();
  constexpr int kPieces = D / 8;  // of 16 bytes in a row
#pragma unroll
  for (int i = 0; i < 16 * kPieces; i += 32) {
    const int row = (i + lane) / kPieces, piece = (i + lane) % kPieces;
    const uint4 values = *(const uint4*)(own + row * D * 2 + ((piece ^ (row & 7)) << 4));
    if (first + row < work.queries) {
      const int64_t to = ((int64_t)(work.first_query + first + row) * params.heads + work.head) * D + piece * 8;
      *(uint4*)((T*)params.out + to) = values;
    }
  }
  __syncwarp();
}

template <class T, int D>
__device__ __forceinline__ void consume(const Params& params, Shared<D>& shared) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0);
  const int lane = threadIdx.x % 32;
  const int row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // this thread's first
  const uint32_t k_operand = operand(shared.k, 0);
  const uint32_t v_operand = operand(shared.v, kTileK * 128);
  constexpr int kStageStep = kTileK * D * 2 >> 4;
  const int turn = 1 + group, others_turn = 2 - group;  // named barriers
  if (group == 1) named_barrier_arrive(others_turn, 256);

  float o[D / 2], s[64], fade[2];
  uint32_t q[D / 16][4], p[32];
  Place<kStagesK> k;
  Place<kStagesV> v;
  int round = 0, tile, accumulate;
  bool fades;
  bool half;  // the first tile shows these rows no more than its first half
  constexpr std::true_type yes;
  constexpr std::false_type no;
  Work work = {};
  Softmax softmax;

  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) barrier_arrive(barrier);
  };
  const auto load_queries = [&] {
    const int at = lane % 8 + lane / 8 % 2 * 8;  // a row of this warp's 16
    const uint32_t base = shared_address(shared.q) + (group * 64 + threadIdx.x / 32 % 4 * 16 + at) * 128;
    barrier_wait(&shared.q_full, round & 1);
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
      load_matrices(q[i], base + i / 4 * kTileQ * 128 + (((i % 4 * 2 + lane / 16) ^ (at & 7)) << 4));
    release(&shared.q_empty);
  };
  const auto issue_scores = [&](auto half) {
    named_barrier_sync(turn, 256);
    pin(s);
    matrix_fence();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const uint32_t b = k_operand + k.stage * kStageStep + i / 4 * (kTileK * 128 >> 4) + i % 4 * 2;
      if (decltype(half)::value) multiply_transposed(T(), *(float(*)[32]) & s, q[i], b, i > 0);
      else multiply_transposed(T(), s, q[i], b, i > 0);
    }
    matrix_commit();
  };
  const auto issue_values = [&](auto half) {
    matrix_fence();
#pragma unroll
    for (int i = 0; i < kTileK / (decltype(half)::value ? 32 : 16); ++i)
      multiply(T(), o, p + 4 * i, v_operand + v.stage * kStageStep + i * (16 * 128 >> 4), accumulate | i);
    matrix_commit();
  };
  const auto weigh = [&](auto masked) {
    // the last visible column of this thread's first row, counted from the first of its own columns in the tile
    const int last_column = work.position + row - lane % 4 * 2 - tile * kTileK;
    fades = softmax.step<decltype(masked)::value>(s, params.scale_log2, last_column, fade);
    pin(s);
    // Long since true; its loop keeps the compiler from moving the exponentials behind the wait for O.
    barrier_wait(&shared.v_full[v.stage], v.parity);
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack(T(), s[2 * i], s[2 * i + 1]);
  };
  // Scores of tile `tile` under the values of the one before, then its softmax; O is whole after it.
  const auto step = [&](auto masked, auto half_scores, auto half_values) {
    barrier_wait(&shared.k_full[k.stage], k.parity);
    barrier_wait(&shared.v_full[v.stage], v.parity);
    issue_scores(half_scores);
    issue_values(half_values);
    named_barrier_arrive(others_turn, 256);
    matrix_wait<1>(s);
    release(&shared.k_empty[k.stage]);
    k.next();
    weigh(masked);
    matrix_wait<0>(o);
    pin(s);
    release(&shared.v_empty[v.stage]);
    v.next();
  };
  const auto advance = [&](auto masked, auto half_values) {
    --tile;
    step(masked, no, half_values);
    if (fades) {
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] *= fade[i >> 1 & 1];
    }
    pack_weights();
    accumulate = 1;
  };
  const auto start = [&] {
    softmax.reset();
    tile = work.key_tiles - 1;
    half = work.position + group * 64 + 63 < tile * kTileK + kTileK / 2;
    load_queries();
  };

  work.fetch(params, 0);
  start();
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0;
  barrier_wait(&shared.k_full[k.stage], k.parity);
  issue_scores(no);
  named_barrier_arrive(others_turn, 256);
  matrix_wait<0>(s);
  release(&shared.k_empty[k.stage]);
  k.next();
  weigh(yes);
  pack_weights();
  while (true) {
    accumulate = 0;
    if (half && tile > 0) advance(yes, yes);
    while (tile > 0 && tile * kTileK - 1 > work.position + group * 64) advance(yes, no);
    while (tile > 0) advance(no, no);
    const Work done = work;
    const float total[2] = {softmax.total[0], softmax.total[1]};
    if (!work.fetch(params, ++round)) {
      barrier_wait(&shared.v_full[v.stage], v.parity);
      issue_values(no);
      matrix_wait<0>(o);
      write_out<T, D>(params, shared, done, total, o);
      break;
    }
    // from item to item as inside one: the next one's first scores under this one's last values
    start();
    if (half) step(yes, yes, no);
    else step(yes, no, no);
    write_out<T, D>(params, shared, done, total, o);
    pack_weights();
  }
  if (group == 0) named_barrier_sync(turn, 256);  // what the other left behind
}

}  // namespace ember::prefill
