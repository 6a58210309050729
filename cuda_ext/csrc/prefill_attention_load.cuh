// Prefill attention, the side that loads: what a block shares, its list of work, and the warps that copy K and V.
#pragma once

#include "hopper.cuh"

namespace ember::prefill {

using namespace hopper;

constexpr int kTileQ = 128, kTileK = 128, kStagesK = 2, kStagesV = 3, kThreads = 384;
constexpr int kColumns = 64;  // of 2 bytes: a swizzled row of 128 bytes
constexpr int kShortestRun = 8;

template <int D>
struct alignas(1024) Shared {
  uint8_t q[kTileQ * D * 2];  // as D / 64 blocks of [rows, 64]; K and V too
  uint8_t k[kStagesK][kTileK * D * 2];
  uint8_t v[kStagesV][kTileK * D * 2];
  uint8_t out[kTileQ * D * 2];
  uint64_t q_full, q_empty, k_full[kStagesK], k_empty[kStagesK], v_full[kStagesV], v_empty[kStagesV];
};

// A place in a ring of stages, and the parity of the round through it.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

struct Params {
  CUtensorMap q_map, k_map, v_map;  // boxes of 128 queries, and of `run` positions
  CUtensorMap k_row_map, v_row_map;  // boxes of one position
  void* out;
  const int4* tiles;     // (first packed query, queries, position of the first, first packed position), longest first
  const int64_t* slots;  // of each packed position; null where K and V are packed themselves
  int num_tiles, heads, group, run;
  float scale_log2;
};

// Where a block is in its list of work: tiles of the longest rows first, back and forth over the blocks, so that all
// end together. The heads of one KV head are neighbours, and read its tiles at about the same time.
struct Work {
  int head, first_query, queries, position, first_key, key_tiles;
  __device__ __forceinline__ bool fetch(const Params& params, int round) {
    const int item = round * gridDim.x + (round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (item >= params.num_tiles * params.heads) return false;
    const int tile = item / params.heads;
    head = item - tile * params.heads;
    const int4 t = params.tiles[tile];
    first_query = t.x, queries = t.y, position = t.z, first_key = t.w;
    key_tiles = (position + queries + kTileK - 1) / kTileK;
    return true;
  }
};

// Copies tiles of K, or of V, into its ring; one of two warps that take half of the rows each. (Issuing copies takes
// time: with runs of 16 rows, one warp for all of K and V held the products up by a third.)
template <int D, bool kValues, int kStages>
__device__ __forceinline__ void produce(const Params& params, Shared<D>& shared,
                                        uint8_t (&stages)[kStages][kTileK * D * 2], uint64_t (&full)[kStages],
                                        uint64_t (&empty)[kStages], const CUtensorMap& map, const CUtensorMap& row_map,
                                        int half) {
  constexpr int kRows = kTileK / 2, kParts = D / kColumns;
  const int lane = threadIdx.x & 31;
  const int own = half * kRows;  // first of its rows in a tile
  Work work = {};
  Place<kStages> place;
  for (int round = 0; work.fetch(params, round); ++round) {
    const int kv_head = work.head / params.group, end = work.position + work.queries;
    for (int tile = work.key_tiles - 1; tile >= 0; --tile) {
      const int first = tile * kTileK, count = params.slots == nullptr ? kTileK : min(kTileK, end - first);
      const int own_count = max(0, min(kRows, count - own));
      const int runs = own_count / params.run, whole = runs * params.run;
      uint8_t* stage = stages[place.stage];
      uint64_t* barrier = &full[place.stage];
      const auto row_of = [&](int row) {
        const int at = work.first_key + first + row;
        return params.slots == nullptr ? at : (int)params.slots[at];
      };
      const auto load = [&](const CUtensorMap& from, int row, int part, int z) {
        load_box<1>(stage + (part * kTileK + row) * 128, from, barrier, part * kColumns, kv_head, z);
      };
      const int run_row = own + lane / kParts * params.run, run_at = lane < runs * kParts ? row_of(run_row) : 0;
      barrier_wait(&empty[place.stage], place.parity ^ 1);
      if (half == 0) {
        if (kValues && count < kTileK) {  // 0 * V must be 0 where nothing is loaded
#pragma unroll 1
          for (int i = count * 8 + lane; i < kTileK * 8; i += 32)
#pragma unroll
            for (int part = 0; part < kParts; ++part)
              *(uint4*)(stage + part * kTileK * 128 + i * 16) = make_uint4(0, 0, 0, 0);
          fence_async_proxy();
          __syncwarp();
        }
        if (lane == 0) barrier_expect(barrier, count * D * 2);
      }
      if (lane < runs * kParts) load(map, run_row, lane % kParts, run_at);
#pragma unroll 1
      for (int i = lane; i < (own_count - whole) * kParts; i += 32) {
        const int row = own + whole + i / kParts;
        load(row_map, row, i % kParts, row_of(row));
      }
      __syncwarp();
      place.next();
      if (!kValues && half == 1 && tile == work.key_tiles - 1) {  // the queries, after the first tile of K
        barrier_wait(&shared.q_empty, (round & 1) ^ 1);
        if (lane == 0) {
          barrier_expect(&shared.q_full, kTileQ * D * 2);
#pragma unroll
          for (int part = 0; part < kParts; ++part)
            load_box<1>(shared.q + part * kTileQ * 128, params.q_map, &shared.q_full, part * kColumns, work.head,
                     work.first_query);
        }
        __syncwarp();
      }
    }
  }
}

}  // namespace ember::prefill
