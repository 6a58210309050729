// silu(x gate^T) * (x up^T) on Hopper's matrix units, bfloat16 and float16: both products at once, so that gate and up
// never leave the registers.
//
// A tile of the output is kRows columns of it (as many rows of gate and of up) by N tokens; the weights are the left
// operand, so that a tile may have any multiple of 8 tokens: with 160, 800 tokens fill all multiprocessors three times.
// Two blocks of a cluster take neighbouring tiles and share the loads of what both need: the weights, if the tiles are
// neighbours along the tokens (the faster way), else the tokens. One thread of a block asks for the copies; two
// warpgroups compute half of the columns each. They run up to the ring's length apart, so that one multiplies while the
// other gates and writes.
//
// An adapter beside the projection is a longer inner dimension, [x | down] . [W | B]^T with down = s x A^T: behind the
// stages of x and W the ring gets those of down and B. Of B a stage has the ranks of gate and of up in their own
// columns; all others are outside of the tensor, and the copy engine writes zeros there.
#include "hopper.cuh"
#include "hopper_host.cuh"
#include "hopper_products.cuh"
#include "low_rank.cuh"

namespace ember::gated {

using namespace hopper;

constexpr int kThreads = 384, kRows = 128, kDepth = 64, kCluster = 2;
constexpr int kChunk = 32, kBuffers = 2;  // tokens of a store, and stores of a warpgroup under way

// Stages of the ring, as many as fit.
template <int N>
constexpr int kStages = N > 160 ? 3 : 4;

template <int N>
struct alignas(1024) Shared {
  uint8_t w[kStages<N>][2 * kRows * kDepth * 2];  // gate above up
  uint8_t x[kStages<N>][N * kDepth * 2];
  uint8_t out[2][kBuffers][kChunk * 128];
  uint64_t full[kStages<N>], empty[kStages<N>];
};

struct Params {
  CUtensorMap w_map, x_map, out_map;  // [2, ffn, in], [tokens, in], [tokens, ffn]
  CUtensorMap b_map[2], down_map;     // of gate and up [ffn, rank]; [tokens, ranks]
  int across, along, blocks;  // clusters' places along the tokens and the output's columns; stages along `in`
  int all_blocks;             // and those of an adapter
  int first_rank[2];          // of gate and up in down
};

// Far outside of any tensor: zeros are what comes.
constexpr int kNowhere = 1 << 20;

// The tile of a block: its first token and column. So many tokens stay in the L2 cache while all weights go by.
template <int N, bool kAlongTokens>
struct Item {
  static constexpr int kGroup = kAlongTokens ? 8 : 16, kTokens = kAlongTokens ? N * kCluster : N;
  int token, column;
  __device__ __forceinline__ Item(const Params& params, int index) {
    const int whole = kGroup * params.along, group = index / whole, rest = index - group * whole;
    const int width = min(kGroup, params.across - group * kGroup), rank = blockIdx.x % kCluster;
    column = rest / width;
    token = (group * kGroup + rest - column * width) * kTokens + (kAlongTokens ? rank * N : 0);
    column = kAlongTokens ? column * kRows : (column * kCluster + rank) * kRows;
  }
};

// A place in the ring, and the parity of the round through it.
template <int kCount>
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kCount) stage = 0, parity ^= 1;
  }
};

template <int N, bool kAlongTokens>
__device__ __forceinline__ void produce(const Params& params, Shared<N>& shared) {
  const int rank = blockIdx.x % kCluster;
  Place<kStages<N>> place;
  for (int i = blockIdx.x / kCluster; i < params.across * params.along; i += gridDim.x / kCluster) {
    const Item<N, kAlongTokens> item(params, i);
    for (int block = 0; block < params.all_blocks; ++block) {
      uint64_t* const full = &shared.full[place.stage];
      barrier_wait(&shared.empty[place.stage], place.parity ^ 1);  // in both blocks
      barrier_expect(full, (2 * kRows + N) * kDepth * 2);
      uint8_t *const w = shared.w[place.stage], *const x = shared.x[place.stage];
      const int rank_place = (block - params.blocks) * kDepth;
      if (rank_place >= 0 && kAlongTokens) {
        load_box<kCluster>(w + rank * kRows * 128, params.b_map[rank], full, rank_place - params.first_rank[rank],
                           item.column, 0);
        load_box<1>(x, params.down_map, full, rank_place, item.token, 0);
      } else if (rank_place >= 0) {
        for (int i = 0; i < 2; ++i)
          load_box<1>(w + i * kRows * 128, params.b_map[i], full, rank_place - params.first_rank[i], item.column, 0);
        load_box<kCluster>(x + rank * (N / kCluster) * 128, params.down_map, full, rank_place,
                           item.token + rank * (N / kCluster), 0);
      } else if (kAlongTokens) {  // one gives the gate to both, the other up
        load_box<kCluster>(w + rank * kRows * 128, params.w_map, full, block * kDepth, item.column, rank);
        load_box<1>(x, params.x_map, full, block * kDepth, item.token, 0);
      } else {
        load_box<1>(w, params.w_map, full, block * kDepth, item.column, 0);
        load_box<kCluster>(x + rank * (N / kCluster) * 128, params.x_map, full, block * kDepth,
                           item.token + rank * (N / kCluster), 0);
      }
      place.next();
    }
  }
}

template <class T>
__device__ __forceinline__ uint32_t gate(const float* gate, const float* up) {
  float y[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) y[i] = __fdividef(gate[i] * up[i], 1.0f + __expf(-gate[i]));
  return pack(T(), y[0], y[1]);
}

template <class T, int N, bool kAlongTokens>
__device__ __forceinline__ void consume(const Params& params, Shared<N>& shared) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128 - 1, 0), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const bool leads = threadIdx.x % 128 == 0;
  const uint32_t gate_operand = operand(shared.w[0] + group * 64 * 128, 0);
  const uint32_t up_operand = operand(shared.w[0] + (kRows + group * 64) * 128, 0);
  const uint32_t x_operand = operand(shared.x[0], 0);
  const uint32_t empty = cluster_address(shared.empty, lane % kCluster);  // lane i tells block i
  const auto release = [&](int stage) {
    if (lane < kCluster) barrier_arrive_at(empty + stage * 8);
  };
  float g[N / 2], u[N / 2];
  Place<kStages<N>> place;
  int buffer = 0;
  for (int i = blockIdx.x / kCluster; i < params.across * params.along; i += gridDim.x / kCluster) {
    const Item<N, kAlongTokens> item(params, i);
    int before = 0;  // the stage whose products may still run
#pragma unroll 1
    for (int block = 0; block < params.all_blocks; ++block) {
      barrier_wait(&shared.full[place.stage], place.parity);
      matrix_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        const uint32_t w = place.stage * (2 * kRows * kDepth * 2 >> 4) + k * 2;
        const uint32_t x = x_operand + place.stage * (N * kDepth * 2 >> 4) + k * 2;
        multiply_shared(T(), g, gate_operand + w, x, block | k);
        multiply_shared(T(), u, up_operand + w, x, block | k);
      }
      matrix_commit();
      matrix_wait<1>(g);
      pin(u);
      if (block > 0) release(before);
      before = place.stage;
      place.next();
    }
    matrix_wait<0>(g);
    pin(u);
    release(before);

    // Each warp turns its 16 columns of kChunk tokens over in shared memory: there a row is a token.
#pragma unroll
    for (int chunk = 0; chunk < N / kChunk; ++chunk) {
      if (leads) wait_stores_read<kBuffers - 1>();
      named_barrier_sync(1 + group, 128);
      uint8_t* const out = shared.out[group][buffer];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = lane % 8, token = half * 16 + lane / 16 * 8 + at, piece = warp * 2 + lane / 8 % 2;
        const float *gates = g + chunk * 16 + half * 8, *ups = u + chunk * 16 + half * 8;
        store_matrices_transposed(shared_address(out) + token * 128 + ((piece ^ at) << 4), gate<T>(gates, ups),
                                  gate<T>(gates + 2, ups + 2), gate<T>(gates + 4, ups + 4),
                                  gate<T>(gates + 6, ups + 6));
      }
      fence_async_proxy();
      named_barrier_sync(1 + group, 128);
      if (leads) {
        store_box(params.out_map, out, item.column + group * 64, item.token + chunk * kChunk, 0);
        commit_stores();
      }
      buffer = (buffer + 1) % kBuffers;
    }
  }
  if (leads) wait_stores();
}

template <class T, int N, bool kAlongTokens>
__global__ void __launch_bounds__(kThreads, 1) linear_swiglu_kernel(const __grid_constant__ Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t raw[];
  auto& shared = *(Shared<N>*)((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages<N>; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], 8 * kCluster);
    }
    barrier_init_fence();
  }
  cluster_sync();
  wait_for_predecessor();
  let_successor_start();
  if (threadIdx.x < 128) {
    shrink_registers<24>();
    if (threadIdx.x == 0) produce<N, kAlongTokens>(params, shared);
    __syncwarp();
  } else {
    grow_registers<240>();
    consume<T, N, kAlongTokens>(params, shared);
  }
  cluster_sync();  // the other block may still copy to this one, or arrive here
#elif defined(__CUDA_ARCH__)
  __trap();  // the library was built without sm_90a
#endif
}

// As the C function takes them.
struct Arguments {
  const void *x, *weight;
  void* out;
  int64_t tokens, ffn, in, dtype;
  const void* down;
  int64_t ranks;
  const LoraPart* parts;
  int64_t num_parts;
};

bool describe_adapter(Params& params, const Arguments& args, int down_rows) {
  const auto [x, weight, out, tokens, ffn, in, dtype, down, ranks, parts, num_parts] = args;
  params.first_rank[0] = params.first_rank[1] = kNowhere;
  for (int64_t i = 0; i < num_parts; ++i) {
    const LoraPart& part = parts[i];
    const bool is_up = part.first_row != 0;
    params.first_rank[is_up] = (int)part.first_rank;
    for (int map = 0; map < 2; ++map) {  // where the other one has no adapter, any map will do
      if (map != is_up && num_parts == 2) continue;
      if (!describe(&params.b_map[map], part.b, dtype, {part.rank, ffn, 1}, {part.rank, part.rank * ffn},
                    {kDepth, kRows, 1}))
        return false;
    }
  }
  return num_parts == 0 || describe(&params.down_map, down, dtype, {ranks, tokens, 1}, {ranks, ranks * tokens},
                                    {kDepth, down_rows, 1});
}

template <class T, int N, bool kAlongTokens>
int run(const Arguments& args, cudaStream_t stream) {
  const auto [x, weight, out, tokens, ffn, in, dtype, down, ranks, parts, num_parts] = args;
  static_assert(sizeof(Shared<N>) + 1024 <= 227 * 1024, "more than a multiprocessor has");
  Params params;
  if (!describe(&params.w_map, weight, dtype, {in, ffn, 2}, {in, in * ffn}, {kDepth, kRows, kAlongTokens ? 1 : 2}) ||
      !describe(&params.x_map, x, dtype, {in, tokens, 1}, {in, in * tokens},
                {kDepth, kAlongTokens ? N : N / kCluster, 1}) ||
      !describe(&params.out_map, out, dtype, {ffn, tokens, 1}, {ffn, ffn * tokens}, {64, kChunk, 1}) ||
      !describe_adapter(params, args, kAlongTokens ? N : N / kCluster))
    return fail("x, the weight, the adapter or the result cannot be described to the copy engine: is each aligned to 16 bytes?");
  const int tiles = (int)((tokens + N - 1) / N), columns = (int)(ffn / kRows);
  params.across = kAlongTokens ? (tiles + kCluster - 1) / kCluster : tiles;
  params.along = kAlongTokens ? columns : columns / kCluster;
  params.blocks = (int)(in / kDepth);
  params.all_blocks = params.blocks + (num_parts ? (int)ceil_div(ranks, kDepth) : 0);
  const int clusters = min(device_info().multiprocessors / kCluster, params.across * params.along);
  return launch_clusters(kCluster, linear_swiglu_kernel<T, N, kAlongTokens>, dim3(clusters * kCluster), dim3(kThreads),
                         sizeof(Shared<N>) + 1024, stream, params);
}

template <class T, int N>
int run(const Arguments& args, bool along_tokens, cudaStream_t stream) {
  return along_tokens ? run<T, N, true>(args, stream) : run<T, N, false>(args, stream);
}

template <class T>
int run(const Arguments& args, int64_t tile, bool along_tokens, cudaStream_t stream) {
  if (tile == 128) return run<T, 128>(args, along_tokens, stream);
  if (tile == 160) return run<T, 160>(args, along_tokens, stream);
  if (tile == 192) return run<T, 192>(args, along_tokens, stream);
  return fail("there are tiles of 128, 160 and 192 tokens, not %lld", (long long)tile);
}

}  // namespace ember::gated

// x [tokens, in], weight [2 * ffn, in] with the gate's rows first, out [tokens, ffn]; all contiguous. ffn is a multiple
// of 256 and in of 64. tile: tokens that a block takes at a time; along_tokens: whether the two blocks of a cluster lie
// beside each other along the tokens. An adapter: down [tokens, ranks], which has its scale in it, and a part for all of
// gate, all of up or both, in this order; ranks and those of the parts are multiples of 8. Without one there are no parts.
EMBER_API int ember_linear_swiglu(const void* x, const void* weight, void* out, int64_t tokens, int64_t ffn, int64_t in,
                                  const void* down, int64_t ranks, const ember::LoraPart* parts, int64_t num_parts,
                                  int64_t tile, int64_t along_tokens, int64_t dtype, cudaStream_t stream) {
  using namespace ember;
  if (device_info().major != 9) return fail("linear_swiglu's kernel runs on compute capability 9.0 only");
  if (dtype != kBFloat16 && dtype != kFloat16) return fail("x is neither bfloat16 nor float16");
  if (ffn % (gated::kRows * gated::kCluster) || in % gated::kDepth)
    return fail("a weight of 2 * %lld rows of %lld does not come in whole tiles", (long long)ffn, (long long)in);
  for (int64_t i = 0; i < num_parts; ++i) {
    const LoraPart& part = parts[i];
    if (num_parts > 2 || part.rows != ffn || part.first_row != (num_parts == 2 ? i * ffn : part.first_row / ffn * ffn) ||
        part.rank % 8 || ranks % 8)
      return fail("a part must be all of gate or of up, and its rank a multiple of 8");
  }
  if (tensor_map_encoder() == nullptr) return fail("the driver knows no tensor maps; it must be of CUDA 12.0 or newer");
  if (tokens == 0) return 0;
  const gated::Arguments args = {x, weight, out, tokens, ffn, in, dtype, down, ranks, parts, num_parts};
  return dtype == kBFloat16 ? gated::run<bf16>(args, tile, along_tokens != 0, stream)
                            : gated::run<fp16>(args, tile, along_tokens != 0, stream);
}
