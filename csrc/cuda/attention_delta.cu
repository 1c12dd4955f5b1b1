// attention, backward, before all else: delta = rowsum(dO * O), and the workspace that the other kernels read it from.
// Limit: bytes, of dO and O.
#include "attention_backward.cuh"
#include "reduce.cuh"

namespace attention {

constexpr int THREADS = 128;

// A block has a token, DIM / 8 lanes a query head.
template <int DIM>
__global__ void __launch_bounds__(THREADS)
    attention_delta(Heads grad, const bf16* out, const float* lse, float* to_lse, float* to_delta, int heads,
                    Group group) {
  constexpr int LANES = Row<DIM>::CHUNKS;
  const int64_t token = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % LANES, first = static_cast<int>(threadIdx.x) / LANES;
  for (int turn = 0; turn < heads; turn += THREADS / LANES) {  // all lanes of a warp take part in the sums
    int head = min(turn + first, heads - 1);
    int64_t row = token * heads + head;
    uint4 x = *reinterpret_cast<const uint4*>(grad.at + token * grad.token + head * grad.head + lane * 16);
    uint4 y = *reinterpret_cast<const uint4*>(out + row * DIM + lane * 8);
    uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sum = fmaf(__uint_as_float(xs[i] << 16), __uint_as_float(ys[i] << 16), sum);
      sum = fmaf(__uint_as_float(xs[i] & 0xffff0000u), __uint_as_float(ys[i] & 0xffff0000u), sum);
    }
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0 && turn + first < heads) {
      int64_t to = group.row(head >> group.log_pack, token) + (head & ((1 << group.log_pack) - 1));
      to_lse[to] = lse[row];
      to_delta[to] = -sum;
    }
  }
}

template <int DIM>
int launch_delta(const Heads& grad, const void* out, const void* lse, const Group& g, void* to_lse, void* to_delta,
                 void* stream) {
  int heads = (g.kv_heads * g.chunks) << g.log_pack;
  auto* o = static_cast<const bf16*>(out);
  auto* l = static_cast<const float*>(lse);
  auto *ll = static_cast<float*>(to_lse), *d = static_cast<float*>(to_delta);
  return SIMT_LAUNCH((attention_delta<DIM>), dim3(static_cast<unsigned>(g.tokens)), dim3(THREADS), 0, stream, grad, o,
                     l, ll, d, heads, g);
}

}  // namespace attention

extern "C" int hps_attention_delta(
    const void* grad, const void* out, const void* lse, int64_t grad_token, int64_t grad_head, int64_t tokens,
    int kv_heads, int chunks, int log_pack, int dim, void* to_lse, void* to_delta, void* stream) {
  using namespace attention;
  Heads x = heads(grad, grad_token, grad_head), o = heads(out, dim, dim);
  Group g = group(tokens, kv_heads, chunks, log_pack, x, x);
  if (!fits(x) || !fits(o) || !fits(g, tokens)) return BAD_ARGUMENT;
  if (dim == 64) return launch_delta<64>(x, out, lse, g, to_lse, to_delta, stream);
  if (dim == 128) return launch_delta<128>(x, out, lse, g, to_lse, to_delta, stream);
  return BAD_ARGUMENT;
}
