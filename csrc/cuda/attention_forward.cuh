// attention, forward. Limit: FLOPs on the tensor cores; then the exponentials, at small head dims.
//
// A tile of query_tiles is 128 rows, of one run, of query heads of one kv head. Each of a block's four warps has 32 of
// them, so that a fragment of K or V serves four products; Q, K and V stand in shared memory, V comes while scores are
// made and the next K while they are used.
//
// A weight of 0 times a value of NaN or infinity is NaN. So a tile whose sums have NaN anywhere is done once more by a
// second launch, in which such values reach only the rows that see them; other tiles cost it a look at their flags.
#pragma once
#include "attention_softmax.cuh"

namespace attention {

// 32 rows of Q to a warp's part of shared memory.
template <int DIM>
__device__ __forceinline__ void copy_queries(const Heads& q, const TileRow* rows, unsigned char* to) {
  constexpr int CHUNKS = Row<DIM>::CHUNKS, STEP = 32 / CHUNKS;
  int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
#pragma unroll 4
  for (int i = 0; i < 32 / STEP; i++) {
    int row = threadIdx.x / 32 * 32 + i * STEP + lane / CHUNKS;
    TileRow at = rows[row];
    const unsigned char* from = q.at + (at.token * q.token + at.head * q.head + chunk * 16);
    cp_async16(to + Row<DIM>::at(row, chunk), from, at.token >= 0);
  }
}

// out and lse of a warp's rows, by way of its part of shared memory, where Q was.
template <int DIM, bool REDO>
__device__ __forceinline__ void store(const ForwardArguments& a, const typename Forward<DIM>::Plan& plan,
                                      Sums<DIM>& sums, int program, unsigned char* q) {
  constexpr int CHUNKS = Row<DIM>::CHUNKS, STEP = 32 / CHUNKS;
  int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 32;
  // Rows of no segment have a sum of 0, and so may others have (scores of -inf only): the segment tells.
  bool nothing = plan.segment0 == plan.segment1;
  int64_t heads = static_cast<int64_t>(a.kv_heads) * a.packing.ratio;
  float bad = 0;
#pragma unroll
  for (int r = 0; r < 4; r++) {
    float total = quad_sum(sums.total[r]), factor = nothing ? 1.f : 1.f / total;
    int row = row0 + r * 8 + lane / 4;
    if (!REDO && lane % 4 == 0) {
      TileRow at = plan.rows[row];
      if (at.token >= 0) a.lse[at.token * heads + at.head] = nothing ? 0.f : log2f(total) - sums.minus_top[r];
    }
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) {
      float low = sums.acc[r / 2][d][r % 2 * 2], high = sums.acc[r / 2][d][r % 2 * 2 + 1];
      bad += low * 0.f + high * 0.f;
      *reinterpret_cast<uint32_t*>(q + Row<DIM>::at(row, d) + lane % 4 * 4) = pack_bf16(low * factor, high * factor);
    }
  }
  if (!REDO) {
    bool some = __any_sync(~0u, !(bad == 0.f));
    if (lane == 0) a.redo[static_cast<int64_t>(program) * Forward<DIM>::WARPS + threadIdx.x / 32] = some;
  }
  __syncwarp();
#pragma unroll 4
  for (int i = 0; i < 32 / STEP; i++) {
    int row = row0 + i * STEP + lane / CHUNKS, chunk = lane % CHUNKS;
    TileRow at = plan.rows[row];
    if (at.token >= 0)
      *reinterpret_cast<uint4*>(a.out + (at.token * heads + at.head) * DIM + chunk * 8) =
          *reinterpret_cast<const uint4*>(q + Row<DIM>::at(row, chunk));
  }
}

// The sums of a tile. The whole block calls it.
template <int DIM, bool REDO>
__device__ __forceinline__ void attend(const ForwardArguments& a, typename Forward<DIM>::Plan& plan, Sums<DIM>& sums,
                                       unsigned char* shared) {
  using F = Forward<DIM>;
  using Copy = typename F::Copy;
  if (plan.rest[0].key >= plan.rest[0].key1) return;
  const auto at_k = Fragments<DIM>::right(0);
  const auto at_v = Fragments<DIM>::left(0);
  int q_at = threadIdx.x / 32 * 32 * Row<DIM>::BYTES;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  q_at = opaque(q_at);  // on sm_90 a register more would spill
#endif
  unsigned char *to_k = shared + F::K + Copy::to(), *to_v = shared + F::V + Copy::to();
  typename F::Scores s;
  auto weights = [&](typename F::Weights& w, int k) { make_weights<DIM>(w, sums, s, k, a.scale); };
  copy_queries<DIM>(a.q, plan.rows, shared + F::Q);
  int left = plan.whole - 1;  // the last goes with the rest, that a copy for those may begin in it
  {
    int key = left > 0 ? plan.key(0) : plan.rest[0].key;
    auto copy = [](unsigned char* to, const unsigned char* from, int64_t step) { Copy::copy(to, from, step); };
    auto *k = Copy::from(a.k, plan.kv_head, key), *v = Copy::from(a.v, plan.kv_head, key);
    Copy::copy(to_k, k, a.k_step, left > 0 ? F::KEYS : plan.rest[0].key1 - key);
    cp_async_commit();
    k += a.k_block - a.k_step;
    v -= a.v_step;
    for (; left > 0; left--) {  // every row sees all of it
      cp_async_wait<0>();
      __syncthreads();  // K is there, and V has been used
      copy(to_v, v, a.v_step);
      v += a.v_block;
      cp_async_commit();
      make_scores<DIM>(s, shared + F::Q + q_at, at_v, shared + F::K, at_k);
      cp_async_wait<0>();
      __syncthreads();  // V is there, and K has been used
      if (left == plan.own_blocks) {
        k += plan.k_gap;
        v += plan.v_gap;
      }
      copy(to_k, k, a.k_step);
      k += a.k_block;
      cp_async_commit();
      raise_where_needed<DIM>(sums, s, a.scale);
      add_values<DIM>(sums, shared + F::V, at_v, weights);
    }
  }
  bool more = true;
  for (int turn = 0; more; turn ^= 1) {  // the second launch makes its offsets again, for want of registers
    cp_async_wait<0>();
    __syncthreads();
    Keys now = plan.rest[turn];
    Copy::copy(to_v, Copy::from(a.v, plan.kv_head, now.key), a.v_step, now.key1 - now.key);
    cp_async_commit();
    if (threadIdx.x == 0) plan.rest[turn ^ 1] = plan.behind(now, a.segments);
    __syncwarp();
    make_scores<DIM>(s, shared + F::Q + q_at, REDO ? Fragments<DIM>::left(0) : at_v, shared + F::K,
                     REDO ? Fragments<DIM>::right(0) : at_k);
    cp_async_wait<0>();
    __syncthreads();
    Keys next = plan.rest[turn ^ 1];
    more = next.key < next.key1;
    if (more) Copy::copy(to_k, Copy::from(a.k, plan.kv_head, next.key), a.k_step, next.key1 - next.key);
    cp_async_commit();
    mask_scores<DIM>(s, plan.rest[turn], plan.rows);
    raise_where_needed<DIM>(sums, s, a.scale);
    if constexpr (REDO) {
      keep_weights<DIM>(sums, s, a.scale, shared);
      add_not_finite<DIM>(sums, plan.rest[turn], plan.rows, shared);
      add_values<DIM>(sums, shared + F::V, Fragments<DIM>::left(0), [&](typename F::Weights& w, int k) {
#pragma unroll
        for (int i = 0; i < 8; i++) w[i / 4][i % 4] = kept_weight<DIM>(shared, i / 4, i % 4, k);
      });
    } else {
      add_values<DIM>(sums, shared + F::V, at_v, weights);
    }
  }
}

template <int DIM, bool REDO>
__global__ void __launch_bounds__(Forward<DIM>::THREADS, 2) attention_forward(ForwardArguments a) {
  using F = Forward<DIM>;
  static_assert(F::THREADS == F::ROWS, "a thread for a row");
  SIMT_SHARED(unsigned char, shared);
  auto& plan = *reinterpret_cast<typename F::Plan*>(shared + F::PLAN);
  for (int round = 0; program_of(round) < a.programs; round++) {
    QueryTile t = query_tile(a.tiles, program_of(round), a.kv_heads, a.packing);
    if (t.first >= t.last) continue;
    if (REDO) {
      const int* redo = a.redo + static_cast<int64_t>(program_of(round)) * F::WARPS;
      if (!(redo[0] | redo[1] | redo[2] | redo[3])) continue;
    }
    __syncthreads();  // the plan before has been used
    plan.rows[threadIdx.x] = tile_row<F::ROWS>(t, a.packing, threadIdx.x);
    if (threadIdx.x == 0) {
      plan.round = round;
      plan.set(t, a);
    }
    __syncthreads();
    Sums<DIM> sums;
    attend<DIM, REDO>(a, plan, sums, shared);
    round = plan.round;  // no register holds it through the loops
    store<DIM, REDO>(a, plan, sums, program_of(round), shared + F::Q);
  }
}

// What the launchers do, in two launches.
//   q, k, v    bf16; strides of tokens and heads in elements; all addresses multiples of 16 bytes
//   tiles      of query_tiles, (num_tiles, 4) int32, for 128 / pack tokens each
//   redo       (num_tiles kv_heads ceil(ratio / pack), 4) int32, of no value before and after
//   ratio      query heads of a kv head, of which a tile has up to `pack`
//   blocks     that the GPU holds at a time
template <int DIM>
int launch_forward(const void* q, const void* k, const void* v, void* out, void* lse, const void* segments,
                   const void* tiles, void* redo, int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head,
                   int64_t v_token, int64_t v_head, int64_t num_tiles, int kv_heads, int ratio, int pack,
                   float scale_log2, int blocks, void* stream) {
  using F = Forward<DIM>;
  if (num_tiles <= 0 || kv_heads <= 0 || ratio <= 0 || pack <= 0 || pack > F::ROWS || blocks <= 0) return BAD_ARGUMENT;
  int chunks = (ratio + pack - 1) / pack;
  if (num_tiles > INT32_MAX / 4 / kv_heads / chunks || blocks > INT32_MAX / 4) return BAD_ARGUMENT;
  auto heads = [](const void* x, int64_t token, int64_t head) {
    return Heads{static_cast<const unsigned char*>(x), token * 2, head * 2};
  };
  ForwardArguments a{heads(q, q_token, q_head), heads(k, k_token, k_head), heads(v, v_token, v_head),
                     F::Copy::STEP * k_token * 2, F::Copy::STEP * v_token * 2,
                     F::KEYS * k_token * 2, F::KEYS * v_token * 2,
                     static_cast<bf16*>(out), static_cast<float*>(lse), static_cast<const int*>(segments),
                     static_cast<const int*>(tiles), static_cast<int*>(redo),
                     static_cast<int>(num_tiles) * kv_heads * chunks, kv_heads, {ratio, pack, chunks}, scale_log2};
  dim3 grid(static_cast<unsigned>(min(a.programs, blocks)));
  int raised = SIMT_LAUNCH((attention_forward<DIM, false>), grid, dim3(F::THREADS), F::shared(false), stream, a);
  if (raised) return raised;
  return SIMT_LAUNCH((attention_forward<DIM, true>), grid, dim3(F::THREADS), F::shared(true), stream, a);
}

}  // namespace attention
