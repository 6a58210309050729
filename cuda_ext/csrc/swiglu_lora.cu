// silu(gate + s_g * down_g . B_g^T) * (up + s_u * down_u . B_u^T) of rows [gate | up]: the expansion of lora.cu and the
// gate of swiglu.cu in one read of the rows, with their roundings.
#include "low_rank.cuh"

namespace ember {

constexpr int kSwigluLoraRank = 64;  // all ranks of a row's `left` are in registers at once
template <int kSteps>
constexpr int kSwigluLoraBlocks = kSteps == 1 ? 5 : 3;  // a multiprocessor, where shared memory has room

template <class T>
struct SwigluLora {
  LowRank<T> gate, up;  // `out` of gate is the result, that of up is not used
  int64_t up_offset;    // bytes of shared memory before up's
  int64_t chunk;        // rows a block takes
};

template <class T>
__device__ __forceinline__ float fast_silu(float gate) { return __fdividef(gate, 1.0f + __expf(-gate)); }

// Eight values of a row with LoRA added, rounded as lora_expand does.
template <class Tile, class T, int kUnits>
__device__ __forceinline__ Vector<T, 8> expanded(const Tile& tile, const float (&sum)[kUnits][4][4], int stage,
                                                 int unit, int half, T) {
  const auto before = load_vector<8>(tile.piece(stage, unit, half));
  if (tile.op.rank == 0) return before;
  auto floats = unpack(before);
#pragma unroll
  for (int i = 0; i < 8; i++) floats[i] += tile.op.scale * sum[unit][i / 2][half * 2 + i % 2];
  return pack<T, 8>(floats);
}

// blockIdx.x: a tile of columns of both halves; blockIdx.y: a chunk of tokens. While one half is computed, what it
// takes of `down` for the other is on its way.
template <class T, int kUnits, int kSteps>
__global__ void __launch_bounds__(kLowRankThreads, kSwigluLoraBlocks<kSteps>)
    swiglu_lora_kernel(const SwigluLora<T> op) {
  using Tile = LowRankTile<T, kUnits, kSteps, false, true>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int64_t column0 = (int64_t)blockIdx.x * Tile::kColumns;
  const Tile gate{op.gate, shared, column0}, up{op.up, shared + op.up_offset, column0};
  const int64_t first = blockIdx.y * op.chunk, end = first + op.chunk, last = end < op.gate.rows ? end : op.gate.rows;
  const int gate_depth = Tile::depth_of(op.gate.rank), up_depth = Tile::depth_of(op.up.rank);
  gate.stage();  // B does not change while the model runs
  up.stage();
  wait_for_predecessor();
  let_successor_start();
#pragma unroll
  for (int stage = 0; stage < Tile::kStages; stage++) {
    gate.fetch(first + stage * Tile::kRows, last, stage);
    up.fetch(first + stage * Tile::kRows, last, stage);
  }
  typename Tile::Left left, next;
  gate.load_left(next, first, 0);
  __syncthreads();  // what all have staged
  int stage = 0;
  for (int64_t row0 = first; row0 < last; row0 += Tile::kRows) {
    Vector<T, 8> result[kUnits][2];
    left = next;
    up.load_left(next, row0, 0);
    {
      float sum[kUnits][4][4] = {};
      gate.multiply(sum, left, 0, gate_depth);
      wait_for_copies<2 * Tile::kStages - 2>();  // of this stage, both halves
#pragma unroll
      for (int unit = 0; unit < kUnits; unit++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          auto floats = unpack(expanded(gate, sum, stage, unit, half, T{}));
#pragma unroll
          for (int i = 0; i < 8; i++) floats[i] = fast_silu<T>(floats[i]);
          result[unit][half] = pack<T, 8>(floats);
        }
      }
    }
    left = next;
    gate.load_left(next, row0 + Tile::kRows, 0);
    float sum[kUnits][4][4] = {};
    up.multiply(sum, left, 0, up_depth);
#pragma unroll
    for (int unit = 0; unit < kUnits; unit++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int64_t row = gate.row_of(row0, half);
        const auto eight = multiply(result[unit][half], expanded(up, sum, stage, unit, half, T{}));
        store_eight<true>(op.gate.out + row * op.gate.out_stride, gate.column_of(unit),
                          row < last ? op.gate.columns : 0, eight);
      }
    }
    gate.fetch(row0 + Tile::kStages * Tile::kRows, last, stage);
    up.fetch(row0 + Tile::kStages * Tile::kRows, last, stage);
    stage = (stage + 1) % Tile::kStages;
  }
}

template <class T, int kUnits, int kSteps>
int launch_swiglu_lora(SwigluLora<T> op, cudaStream_t stream) {
  using Tile = LowRankTile<T, kUnits, kSteps, false, true>;
  const int64_t tiles = ceil_div(op.gate.columns, Tile::kColumns);
  op.up_offset = Tile::shared_bytes(op.gate.rank);
  const int64_t shared_bytes = op.up_offset + Tile::shared_bytes(op.up.rank);
  // As many chunks as the multiprocessors hold blocks at once, and not one more: it would be a second wave.
  // Beside its own memory a block takes 1 KiB.
  const int64_t by_memory = device_info().shared_bytes / (shared_bytes + 1024), most = kSwigluLoraBlocks<kSteps>;
  const int64_t blocks = device_info().multiprocessors * (by_memory < most ? by_memory : most);
  const int64_t chunks = blocks > tiles ? blocks / tiles : 1;
  op.chunk = round_up(ceil_div(op.gate.rows, chunks), Tile::kRows);
  const dim3 grid((unsigned)tiles, (unsigned)ceil_div(op.gate.rows, op.chunk));
  return launch(swiglu_lora_kernel<T, kUnits, kSteps>, grid, dim3(kLowRankThreads), shared_bytes, stream, op);
}

}  // namespace ember

// gate_up: [tokens, 2 * ffn] with `stride` elements between rows, out: [tokens, ffn]; rows are whole 16-byte pieces.
// Each part is all rows of gate or all of up; parts is read before this returns.
EMBER_API int ember_swiglu_lora(const void* gate_up, int64_t stride, const void* down, int64_t down_stride, void* out,
                                int64_t tokens, int64_t ffn, const ember::LoraPart* parts, int64_t num_parts,
                                int64_t dtype, cudaStream_t stream) {
  using namespace ember;
  EMBER_DISPATCH(dtype, {
    if constexpr (sizeof(scalar) == 2) {
      LowRank<scalar> half = {};
      half.out = (scalar*)out;
      half.in_stride = stride;
      half.out_stride = half.columns = ffn;
      half.left_stride = down_stride;
      half.rows = tokens;
      half.in = (const scalar*)gate_up;
      SwigluLora<scalar> op = {half, half, 0, 0};
      op.up.in += ffn;
      for (int64_t i = 0; i < num_parts; i++) {
        const LoraPart& part = parts[i];
        LowRank<scalar>& to = part.first_row == 0 ? op.gate : op.up;
        if (part.rows != ffn || part.first_row % ffn != 0 || part.rank > kSwigluLoraRank) {
          return fail("a part must be all of gate or up with a rank of at most %d", kSwigluLoraRank);
        }
        to.left = (const scalar*)down + part.first_rank;
        to.right = (const scalar*)part.b;
        to.right_stride = part.rank;
        to.rank = (int)part.rank;
        to.scale = (float)part.scale;
        to.right_whole = aligned(to.right, part.rank);
        to.left_fours = aligned(to.left, down_stride, 4 * sizeof(scalar)) && part.rank % 4 == 0;
      }
      if (!aligned(op.gate.in, stride) || !aligned(op.up.in, 0) || !aligned(op.gate.out, ffn)) {
        return fail("rows of gate, up and the result must be whole 16-byte pieces");
      }
      if (op.gate.rank > 16 || op.up.rank > 16) return launch_swiglu_lora<scalar, 1, 4>(op, stream);
      return launch_swiglu_lora<scalar, 1, 1>(op, stream);
    } else {
      return fail("only 16-bit types are possible");
    }
  })
  return 0;
}
