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

constexpr int kConsumers = 8, kProducers = 4;  // warps
constexpr int kHeaderBytes = 1024, kMaxSlots = 16;

template <int D>
constexpr int kSlotBytes = kTileTokens* kRowBytes<D>;
// What one warp of a row tile hands to the other: half of its sums, and its maxima and totals.
template <int D>
constexpr int kOutboxBytes = 32 * (D / 16 + 1) * 16;

struct alignas(16) Header {
  uint64_t full[kMaxSlots], empty[kMaxSlots], ready[kQueryRows / 16][2], taken[kQueryRows / 16][2];
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

// One of the warps that copy: it takes 16 rows of every tile.
template <class T, int D>
struct Producer {
  static constexpr int kGroupRows = 16, kGroups = kTileTokens / kGroupRows / kProducers;
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
    int unit = blockIdx.x;
    Item item = item_of(unit);  // before its number is known to be in use: the capacity covers the grid
    const int units = __ldg(p.num_items) * p.kv_heads;
    int blocks = unit < units ? blocks_of(item, 0) : 0;
    bool first = true;  // nothing that a kernel shortly before wrote was read yet
#pragma unroll 1
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
#pragma unroll 1
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
template <class T, int D, int TILES>
struct Consumer {
  const Problem& p;
  Header& header;
  const uint32_t slots;
  char* const outboxes;  // of the pair
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
          if (candidate < num_rows)
            target[r] = (__ldg(p.partial_starts + unit.x + candidate) + unit.w) * p.heads + head * share + row % share;
        }
      }
      release(query_place);
      int first = 0;
      if constexpr (TILES == 2) {
        for (; first + kTileTokens < tokens; first += 2 * kTileTokens) {
          const Place keys = place.after(first == 0 ? 3 : 2);
          step<2>(state, query, {place, keys}, tokens - first, scale, active);
          place = keys.after(2);
        }
      }
      for (; first < tokens; first += kTileTokens) {
        step<1>(state, query, {place}, tokens - first, scale, active);
        place = place.after(first == 0 ? 3 : 2);
      }
      if (active) {
        if (half == 0)
          finish<0>(state, target, scale);
        else
          finish<1>(state, target, scale);
        exchange_phase ^= 1;
      }
    }
  }

  // Takes in this warp's half of COUNT tiles, whose keys lie at given places and their values right after.
  template <int COUNT>
  __device__ __forceinline__ void step(Fragment<T, D>& state, const uint32_t (&query)[D / 16][4],
                                       const Place (&keys)[COUNT], int valid, float scale, bool active) {
    constexpr int kTokens = kTileTokens / 2;
    float scores[COUNT * kTokens / 8][4];
    uint32_t weights[COUNT * kTokens / 16][4];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      wait(header.full[keys[i].slot], keys[i].phase);
      if (active)
        state.template score<kTokens>(query, address_of(keys[i]) + half * kTokens * kRowBytes<D>,
                                      valid - i * kTileTokens - half * kTokens, scores + i * kTokens / 8);
      release(keys[i]);
    }
    if (active) state.template softmax<COUNT * kTokens>(scores, scale, weights);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Place values = keys[i].after(1);
      wait(header.full[values.slot], values.phase);
      if (active)
        state.template add_values<kTokens>(weights + i * kTokens / 16,
                                           address_of(values) + half * kTokens * kRowBytes<D>);
      release(values);
    }
  }

  // Joins the two warps' halves of the tokens. Each of them does so for half of the dims, HALF being its own number.
  template <int HALF>
  __device__ __forceinline__ void finish(Fragment<T, D>& state, const int (&target)[2], float scale) {
    constexpr int kDims = D / 16, kOwn = HALF * kDims, kOther = kDims - kOwn;  // in fragments of 8 dims
    float4* const outbox = reinterpret_cast<float4*>(outboxes + HALF * kOutboxBytes<D>) + lane;
    const float4* const inbox = reinterpret_cast<const float4*>(outboxes + (1 - HALF) * kOutboxBytes<D>) + lane;
    state.reduce_totals();
    wait(header.taken[tile][HALF], exchange_phase ^ 1);
#pragma unroll
    for (int n = 0; n < kDims; ++n) outbox[n * 32] = *reinterpret_cast<const float4*>(state.out[kOther + n]);
    outbox[kDims * 32] = make_float4(state.top[0], state.top[1], state.total[0], state.total[1]);
    __syncwarp();
    if (lane == 0) arrive(header.ready[tile][HALF]);

    wait(header.ready[tile][1 - HALF], exchange_phase);
    const float4 last = inbox[kDims * 32];
    // The first half always holds a token; the second may be empty.
    const float top[2][2] = {{state.top[0], state.top[1]}, {last.x, last.y}};
    const float total[2][2] = {{state.total[0], state.total[1]}, {last.z, last.w}};
    float share[2][2], log_sum[2];  // what the sums of each warp, the own first, count for: exponentials over total
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float highest = fmaxf(top[0][r], top[1][r]);
      share[0][r] = exp2_fast((top[0][r] - highest) * scale);
      share[1][r] = exp2_fast((top[1][r] - highest) * scale);
      const float sum = fmaf(total[HALF][r], share[HALF][r], total[1 - HALF][r] * share[1 - HALF][r]);
      log_sum[r] = fmaf(highest, scale, log2f(sum));
      share[0][r] /= sum;
      share[1][r] /= sum;
    }
    float joined[kDims][4];
#pragma unroll
    for (int n = 0; n < kDims; ++n) {
      const float4 word = inbox[n * 32];
      const float other[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        joined[n][i] = fmaf(state.out[kOwn + n][i], share[0][i / 2], other[i] * share[1][i / 2]);
    }
    __syncwarp();
    if (lane == 0) arrive(header.taken[tile][1 - HALF]);
#pragma unroll
    for (int r = 0; r < 2; ++r) store<kOwn>(joined, r, target[r], log_sum[r]);
  }

  // Partial results are float16 with one power of two for each half of a row: half the traffic of float32, and their
  // rounding (2^-12 of each number) is far below that of the output.
  template <int OWN>
  __device__ __forceinline__ void store(const float (&joined)[D / 16][4], int r, int target, float log_sum) {
    float largest = 0.f;
#pragma unroll
    for (int n = 0; n < D / 16; ++n)
      largest = fmaxf(largest, fmaxf(fabsf(joined[n][2 * r]), fabsf(joined[n][2 * r + 1])));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    if (target < 0) return;
    // 2^14 / 2^floor(log2(largest)) and its inverse, from the exponent's bits; kept away from both ends.
    const int exponent = min(max(__float_as_int(largest) >> 23 & 0xff, 40), 250);
    const float factor = __int_as_float((127 + 14 + 127 - exponent) << 23);
    const float unit = __int_as_float((exponent - 14) << 23);
    const uint64_t policy = evict_last_policy();
    uint4* const row = reinterpret_cast<uint4*>(p.partials + (int64_t)target * D) + OWN + lane % 4;
#pragma unroll
    for (int n = 0; n < D / 16; n += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        word[i] = pack<fp16>(joined[n + i][2 * r] * factor, joined[n + i][2 * r + 1] * factor);
      asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(row + n), "r"(word[0]),
                   "r"(word[1]), "r"(word[2]), "r"(word[3]), "l"(policy)
                   : "memory");
    }
    if (lane % 4 == 0) p.stats[2 * (int64_t)target + (OWN > 0)] = make_float2(log_sum, unit);
  }
};

// On sm_90a registers move from the copying to the computing warps, and a step takes two tiles.
enum Method { kPlain, kMovesRegisters };

template <class T, int D, Method METHOD>
__global__ void __launch_bounds__(32 * (kConsumers + kProducers), 1)
    split_kernel(const __grid_constant__ Problem p, int num_slots) {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (METHOD == kMovesRegisters) return;  // launch_splits() sees that there is nothing here
#endif
  extern __shared__ __align__(128) char shared[];
  Header& header = *reinterpret_cast<Header*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < num_slots; ++i) {
      init_barrier(header.full[i], 32 * kProducers + 1);
      init_barrier(header.empty[i], kConsumers);
    }
    for (int i = 0; i < kConsumers; ++i) {
      init_barrier(header.ready[i / 2][i % 2], 1);
      init_barrier(header.taken[i / 2][i % 2], 1);
    }
  }
  __syncthreads();
  char* outboxes = shared + kHeaderBytes;
  const uint32_t slots = shared_address(outboxes + kConsumers * kOutboxBytes<D>);
  if (warp >= kConsumers) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (METHOD == kMovesRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
#endif
    const int block_shift = __ffs(p.block_size) - 1;
    Producer<T, D> producer = {p,    header,   slots, warp - kConsumers,
                               lane, evict_first_policy(), block_shift, {0, num_slots, 0}};
    producer.run();
  } else {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (METHOD == kMovesRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
#endif
    wait_for_predecessor();
    let_successor_start();
    const int tile = warp / 2;
    Consumer<T, D, METHOD == kMovesRegisters ? 2 : 1> consumer = {
        p, header, slots, outboxes + 2 * tile * kOutboxBytes<D>, tile, warp % 2, lane, 0};
    consumer.run(num_slots);
  }
}

template <class T, int D, Method METHOD>
int launch_kernel(const Problem& p, cudaStream_t stream) {
  constexpr int kFixed = kHeaderBytes + kConsumers * kOutboxBytes<D>;
  const int num_slots = min(kMaxSlots, (device_info().shared_bytes - kFixed) / kSlotBytes<D>);
  if (num_slots < 3) return fail("decode attention needs %d bytes of shared memory", kFixed + 3 * kSlotBytes<D>);
  const int grid = min(device_info().multiprocessors, max(1, p.max_items * p.kv_heads));
  return launch(split_kernel<T, D, METHOD>, dim3(grid), dim3(32 * (kConsumers + kProducers)),
                kFixed + num_slots * kSlotBytes<D>, stream, p, num_slots);
}

// Whether the library holds sm_90a code and the GPU takes it; without, that kernel is empty.
bool can_move_registers() {
  static const bool can = [] {
    cudaFuncAttributes attributes;
    return device_info().major == 9 &&
           cudaFuncGetAttributes(&attributes, split_kernel<bf16, 128, kMovesRegisters>) == cudaSuccess &&
           attributes.numRegs > 64;
  }();
  return can;
}

template <class T, int D>
int launch_kernel(const Problem& p, cudaStream_t stream) {
  if (can_move_registers()) return launch_kernel<T, D, kMovesRegisters>(p, stream);
  return launch_kernel<T, D, kPlain>(p, stream);
}

}  // namespace

int launch_splits(const Problem& p, int64_t dtype, cudaStream_t stream) {
  if (dtype == kBFloat16 && p.head_dim == 64) return launch_kernel<bf16, 64>(p, stream);
  if (dtype == kBFloat16 && p.head_dim == 128) return launch_kernel<bf16, 128>(p, stream);
  if (dtype == kFloat16 && p.head_dim == 64) return launch_kernel<fp16, 64>(p, stream);
  if (dtype == kFloat16 && p.head_dim == 128) return launch_kernel<fp16, 128>(p, stream);
  return fail("decode attention on tensor cores takes head_dim 64 or 128, not %d", p.head_dim);
}

}  // namespace ember::decode
