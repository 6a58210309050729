// Group decode attention, first kernel: partial results over pieces of a prefix or of a long suffix.
//
// A unit of work is one item and one KV head: up to 64 query rows (a group's candidates x the query heads of the KV
// head) over at most split_tokens tokens. One CTA an SM goes through its units. Its last warps copy tiles of 64
// rows into a ring in shared memory, running ahead over the ends of units; a unit's tiles are
//   K 0, V 0, Q, K 1, V 1, K 2, V 2, ...
// with Q third, so that the first K and V can be asked for before the kernel that makes Q has ended. Eight warps
// compute: warp 2 i + h takes query rows 16 i to 16 i + 15 over half h of each tile's tokens; the halves meet at the
// end of the unit. What a row computes depends only on its own piece: the result is equal to the bit in any batch.
#include "decode_attention.cuh"

namespace ember::decode {
namespace {

constexpr int kConsumerWarps = 8, kHeaderBytes = 1024, kMaxSlots = 16;

template <int D>
constexpr int kSlotBytes = kTileTokens* kRowBytes<D>;
// What the second warp of a row tile hands to the first: its Fragment.
template <int D>
constexpr int kExchangeBytes = 32 * (D / 8 + 1) * 16;

struct alignas(16) Header {
  uint64_t full[kMaxSlots], empty[kMaxSlots], ready[kQueryRows / 16], taken[kQueryRows / 16];
  int4 units[kMaxSlots];  // beside the Q tile of a slot: first row, rows | head << 16 (0 ends), tokens, partial
};
static_assert(sizeof(Header) <= kHeaderBytes, "the header outgrew its place");

// mbarrier: the asynchronous barrier of PTX ISA 7.0.
__device__ __forceinline__ void init_barrier(const uint64_t& barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(const uint64_t& barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(&barrier))
               : "memory");
}
__device__ __forceinline__ void wait(const uint64_t& barrier, uint32_t phase) {
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#else
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#endif
                 : "=r"(done)
                 : "r"(shared_address(&barrier)), "r"(phase)
                 : "memory");
  } while (!done);
}

// A place in the ring, and how often, modulo 2, the ring went round before.
struct Place {
  int slot, slots;
  uint32_t phase;

  __device__ __forceinline__ Place after(int steps) const {
    Place next = {slot + steps, slots, phase};
    if (next.slot >= slots) {
      next.slot -= slots;
      next.phase ^= 1;
    }
    return next;
  }
};

// One of the warps that copy: it takes WARPS-th parts of every tile, in groups of 16 rows.
template <class T, int D, int WARPS>
struct Producer {
  static constexpr int kGroupRows = 16, kGroups = kTileTokens / kGroupRows / WARPS;
  static constexpr int kChunks = D / 8, kRowsAtOnce = 32 / kChunks;  // chunks of 16 bytes

  const Problem& p;
  Header& header;
  const uint32_t slots;  // shared address of the ring
  const int warp, lane;
  const uint64_t policy;
  const int block_shift;
  Place place;

  __device__ __forceinline__ Item item_of(int unit) const {
    const int4* words = reinterpret_cast<const int4*>(p.items) + 2 * (unit / p.kv_heads);
    const int4 a = __ldg(words), b = __ldg(words + 1);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  }

  // Each lane's KV block, of 32 from `first` on.
  __device__ __forceinline__ int blocks_of(const Item& item, int first) const {
    const int block = first + lane;
    const int* blocks = (item.kind == 0 ? p.prefix_blocks : p.suffix_blocks) + item.first_block;
    return block << block_shift < item.tokens ? __ldg(blocks + block) : 0;
  }

  __device__ __forceinline__ uint32_t begin_tile() {
    wait(header.empty[place.slot], place.phase ^ 1);
    return slots + place.slot * kSlotBytes<D> + lane / kChunks * kRowBytes<D> + lane % kChunks * 16;
  }
  __device__ __forceinline__ void end_tile() {
    const uint32_t full = shared_address(&header.full[place.slot]);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full) : "memory");
    if (warp == 0 && lane == 0) arrive(header.full[place.slot]);  // orders what this lane wrote to header.units
    place = place.after(1);
  }

  // Token `tile` * 64 and the following of one KV head; `blocks` as blocks_of gave them.
  __device__ __forceinline__ void copy_tokens(const void* cache, const Item& item, int head, int tile, int blocks) {
    const int64_t stride = (int64_t)p.kv_heads * D;
    const T* const base = static_cast<const T*>(cache) + head * D + lane % kChunks * 8;
    const uint32_t target = begin_tile();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      // 16 tokens lie in one block. Behind the end the last token is copied again: what is masked must be finite.
      const int row = (warp * kGroups + g) * kGroupRows, last = item.tokens - 1;
      const int first = min(tile * kTileTokens + row, last & ~(kGroupRows - 1));
      const int block = __shfl_sync(~0u, blocks, (first >> block_shift) % 32);
      const T* const from = base + (((int64_t)block << block_shift) + (first & (p.block_size - 1))) * stride;
#pragma unroll
      for (int i = 0; i < kGroupRows; i += kRowsAtOnce)
        copy_16_bytes(target + (row + i) * kRowBytes<D>, from + min(i + lane / kChunks, last - first) * stride, policy);
    }
    end_tile();
  }

  __device__ __forceinline__ void copy_queries(const Item& item, int head) {
    const int share = p.heads / p.kv_heads, count = item.num_rows * share;
    const T* const base = static_cast<const T*>(p.q) + head * share * D + lane % kChunks * 8;
    const uint32_t target = begin_tile();
    if (warp == 0 && lane == 0)
      header.units[place.slot] = make_int4(item.first_row, item.num_rows | head << 16, item.tokens, item.partial);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int first = (warp * kGroups + g) * kGroupRows;
      if (first >= count) break;
#pragma unroll
      for (int i = 0; i < kGroupRows; i += kRowsAtOnce) {
        const int row = min(first + i + lane / kChunks, count - 1);
        copy_16_bytes(target + (first + i) * kRowBytes<D>,
                      base + ((int64_t)(item.first_row + row / share) * p.heads + row % share) * D, policy);
      }
    }
    end_tile();
  }

  __device__ void run() {
    const int units = __ldg(p.num_items) * p.kv_heads;
    int unit = blockIdx.x;
    Item item = {};
    int blocks = 0;
    if (unit < units) {
      item = item_of(unit);
      blocks = blocks_of(item, 0);
    }
    bool first = true;  // nothing that a kernel shortly before wrote was read yet
    for (; unit < units; unit += gridDim.x) {
      const bool is_prefix = item.kind == 0;
      const int head = unit % p.kv_heads;
      const Item next = unit + gridDim.x < units ? item_of(unit + gridDim.x) : item;
      if (first && !is_prefix) start();
      first = first && is_prefix;
      int next_blocks;
      if (is_prefix || __ldcg(p.suffix_lens + item.first_row) > item.live_above) {
        copy_tokens(p.k, item, head, 0, blocks);
        copy_tokens(p.v, item, head, 0, blocks);
        if (first) start();
        first = false;
        copy_queries(item, head);
        next_blocks = blocks_of(next, 0);
        for (int tile = 1; tile * kTileTokens < item.tokens; ++tile) {
          const int token = tile * kTileTokens, block = token >> block_shift;
          if (block % 32 == 0 && block << block_shift == token) blocks = blocks_of(item, block);
          copy_tokens(p.k, item, head, tile, blocks);
          copy_tokens(p.v, item, head, tile, blocks);
        }
      } else {
        next_blocks = blocks_of(next, 0);
      }
      item = next;
      blocks = next_blocks;
    }
    if (first) start();
    place = place.after(2);
    begin_tile();
    if (warp == 0 && lane == 0) header.units[place.slot] = make_int4(0, 0, 0, 0);
    end_tile();
  }

  static __device__ __forceinline__ void start() {
    wait_for_predecessor();
    let_successor_start();
  }
};

// A pair of warps: one tile of 16 query rows.
template <class T, int D>
struct Consumer {
  const Problem& p;
  Header& header;
  const uint32_t slots;
  char* const exchange;  // this pair's
  const int tile, half, lane;
  uint32_t exchange_phase;

  __device__ __forceinline__ void release(const Place& place) {
    __syncwarp();
    if (lane == 0) arrive(header.empty[place.slot]);
  }
  __device__ __forceinline__ uint32_t address_of(const Place& place) const {
    return slots + place.slot * kSlotBytes<D>;
  }

  __device__ void run(int num_slots) {
    const int share = p.heads / p.kv_heads;
    const float scale = p.scale * kLog2e;
    for (Place place = {0, num_slots, 0};;) {
      const Place query_place = place.after(2);
      wait(header.full[query_place.slot], query_place.phase);
      const int4 unit = header.units[query_place.slot];
      if (unit.y == 0) return;
      const int num_rows = unit.y & 0xffff, head = unit.y >> 16, tokens = unit.z;
      const bool active = tile * 16 < num_rows * share;
      uint32_t query[D / 16][4];
      int target[2];  // where this thread's two rows go, in rows of the partial results; -1: nowhere
      Fragment<T, D> state;
      state.clear();
      if (active) {
        const uint32_t address = address_of(query_place) + (tile * 16 + lane % 16) * kRowBytes<D> + lane / 16 * 16;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) load_matrices(query[k], address + k * 32);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int row = tile * 16 + r * 8 + lane / 4, candidate = row / share;
          target[r] = -1;
          if (candidate < num_rows && half == 0)
            target[r] = (__ldg(p.partial_starts + unit.x + candidate) + unit.w) * p.heads + head * share + row % share;
        }
      }
      release(query_place);
      for (int first = 0; first < tokens; first += kTileTokens) {
        constexpr int kTokens = kTileTokens / 2;
        uint32_t weights[kTokens / 16][4];
        const Place values_place = place.after(1);
        wait(header.full[place.slot], place.phase);
        if (active)
          state.template score<kTokens>(query, address_of(place) + half * kTokens * kRowBytes<D>,
                                        tokens - first - half * kTokens, scale, weights);
        release(place);
        wait(header.full[values_place.slot], values_place.phase);
        if (active)
          state.template add_values<kTokens>(weights, address_of(values_place) + half * kTokens * kRowBytes<D>);
        release(values_place);
        place = place.after(first == 0 ? 3 : 2);
      }
      if (active) {
        state.reduce_totals();
        if (half == 1) {
          give(state);
        } else {
          take(state, scale);
          store(state, target, scale);
        }
        exchange_phase ^= 1;
      }
    }
  }

  __device__ __forceinline__ void give(const Fragment<T, D>& state) {
    float4* words = reinterpret_cast<float4*>(exchange) + lane;
    wait(header.taken[tile], exchange_phase ^ 1);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      words[n * 32] = make_float4(state.out[n][0], state.out[n][1], state.out[n][2], state.out[n][3]);
    words[D / 8 * 32] = make_float4(state.top[0], state.top[1], state.total[0], state.total[1]);
    __syncwarp();
    if (lane == 0) arrive(header.ready[tile]);
  }

  // Joins the other half. The first half always holds a token; the second may be empty.
  __device__ __forceinline__ void take(Fragment<T, D>& state, float scale) {
    const float4* words = reinterpret_cast<const float4*>(exchange) + lane;
    wait(header.ready[tile], exchange_phase);
    const float4 last = words[D / 8 * 32];
    const float other_top[2] = {last.x, last.y}, other_total[2] = {last.z, last.w};
    float mine[2], other[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float highest = fmaxf(state.top[r], other_top[r]);
      mine[r] = exp2_fast((state.top[r] - highest) * scale);
      other[r] = exp2_fast((other_top[r] - highest) * scale);
      state.total[r] = fmaf(state.total[r], mine[r], other_total[r] * other[r]);
      state.top[r] = highest;
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float4 word = words[n * 32];
      state.out[n][0] = fmaf(state.out[n][0], mine[0], word.x * other[0]);
      state.out[n][1] = fmaf(state.out[n][1], mine[0], word.y * other[0]);
      state.out[n][2] = fmaf(state.out[n][2], mine[1], word.z * other[1]);
      state.out[n][3] = fmaf(state.out[n][3], mine[1], word.w * other[1]);
    }
    __syncwarp();
    if (lane == 0) arrive(header.taken[tile]);
  }

  // Partial results are float16 with one power of two a row: half the traffic of float32, and their rounding (2^-12 of
  // each number) is far below that of the output.
  __device__ __forceinline__ void store(const Fragment<T, D>& state, const int (&target)[2], float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = 1.f / state.total[r];
      float largest = 0.f;
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        largest = fmaxf(largest, fmaxf(fabsf(state.out[n][2 * r]), fabsf(state.out[n][2 * r + 1])));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)) * inverse;
      // 2^14 / 2^floor(log2(largest)) and its inverse, from the exponent's bits; kept away from both ends.
      const int exponent = min(max(__float_as_int(largest) >> 23 & 0xff, 40), 250);
      const float factor = __int_as_float((127 + 14 + 127 - exponent) << 23) * inverse;
      const float unit = __int_as_float((exponent - 14) << 23);
      if (target[r] < 0) continue;
      uint4* row = reinterpret_cast<uint4*>(p.partials + (int64_t)target[r] * D) + lane % 4;
#pragma unroll
      for (int n = 0; n < D / 8; n += 4) {
        uint4 word;
        word.x = pack<fp16>(state.out[n][2 * r] * factor, state.out[n][2 * r + 1] * factor);
        word.y = pack<fp16>(state.out[n + 1][2 * r] * factor, state.out[n + 1][2 * r + 1] * factor);
        word.z = pack<fp16>(state.out[n + 2][2 * r] * factor, state.out[n + 2][2 * r + 1] * factor);
        word.w = pack<fp16>(state.out[n + 3][2 * r] * factor, state.out[n + 3][2 * r + 1] * factor);
        row[n] = word;
      }
      if (lane % 4 == 0) p.stats[target[r]] = make_float2(fmaf(state.top[r], scale, log2f(state.total[r])), unit);
    }
  }
};

template <class T, int D, int WARPS>
__global__ void __launch_bounds__(32 * (kConsumerWarps + WARPS), 1)
    split_kernel(const __grid_constant__ Problem p, int num_slots) {
  extern __shared__ __align__(128) char shared[];
  Header& header = *reinterpret_cast<Header*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < num_slots; ++i) {
      init_barrier(header.full[i], 32 * WARPS + 1);
      init_barrier(header.empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kQueryRows / 16; ++i) {
      init_barrier(header.ready[i], 1);
      init_barrier(header.taken[i], 1);
    }
  }
  __syncthreads();
  char* exchange = shared + kHeaderBytes;
  const uint32_t slots = shared_address(exchange + kQueryRows / 16 * kExchangeBytes<D>);
  if (warp >= kConsumerWarps) {
    Producer<T, D, WARPS> producer = {p,    header,
                                      slots, warp - kConsumerWarps,
                                      lane, evict_first_policy(),
                                      __ffs(p.block_size) - 1, {0, num_slots, 0}};
    producer.run();
  } else {
    wait_for_predecessor();
    let_successor_start();
    const int tile = warp / 2;
    Consumer<T, D> consumer = {p, header, slots, exchange + tile * kExchangeBytes<D>, tile, warp % 2, lane, 0};
    consumer.run(num_slots);
  }
}

template <class T, int D, int WARPS>
int launch_kernel(const Problem& p, cudaStream_t stream) {
  const int fixed = kHeaderBytes + kQueryRows / 16 * kExchangeBytes<D>;
  const int num_slots = min(p.variant & 240 ? p.variant >> 4 & 15 : kMaxSlots, (device_info().shared_bytes - fixed) / kSlotBytes<D>);
  if (num_slots < 3) return fail("decode attention needs %d bytes of shared memory", fixed + 3 * kSlotBytes<D>);
  const int grid = min(device_info().multiprocessors, max(1, p.max_items * p.kv_heads));
  return launch(split_kernel<T, D, WARPS>, dim3(grid), dim3(32 * (kConsumerWarps + WARPS)),
                fixed + num_slots * kSlotBytes<D>, stream, p, num_slots);
}

}  // namespace

int launch_splits(const Problem& p, int64_t dtype, cudaStream_t stream) {
  if (dtype == kBFloat16 && p.head_dim == 128 && (p.variant >> 12) == 1) return launch_kernel<bf16, 128, 1>(p, stream);
  if (dtype == kBFloat16 && p.head_dim == 128 && (p.variant >> 12) == 2) return launch_kernel<bf16, 128, 2>(p, stream);
  if (dtype == kBFloat16 && p.head_dim == 64) return launch_kernel<bf16, 64, 4>(p, stream);
  if (dtype == kBFloat16 && p.head_dim == 128) return launch_kernel<bf16, 128, 4>(p, stream);
  if (dtype == kFloat16 && p.head_dim == 64) return launch_kernel<fp16, 64, 4>(p, stream);
  if (dtype == kFloat16 && p.head_dim == 128) return launch_kernel<fp16, 128, 4>(p, stream);
  return fail("decode attention on tensor cores takes head_dim 64 or 128, not %d", p.head_dim);
}

}  // namespace ember::decode
