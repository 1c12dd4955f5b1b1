// attention, forward. Limit: FLOPs on the tensor cores; then the exponentials, at small head dims.
//
// A tile of query_tiles is 128 rows, of one run, of query heads of one kv head. Each of a block's four warps has 32 of
// them, so that a fragment of K or V serves four products; Q, K and V stand in shared memory, V comes while scores are
// made and the next K while they are used. All segments of a run have one prefix: a tile reads it once for all.
//
// Keys come in blocks counted from the start of the prefix, and of each segment. A row meets the blocks that it sees in
// one order, and those of its neighbours add exact zeros: its bits are the same alone, and whatever shares its tile.
// Its maximum is raised only when a score passes it by a factor of 2^SLACK, by its own scores alone.
//
// A weight of 0 times a value of NaN or infinity is NaN. So a tile whose sums have NaN anywhere is done once more by a
// second launch, in which such values reach only the rows that see them; other tiles cost it a look at their flags.
#pragma once
#include "attention.cuh"

namespace attention {

struct ForwardArguments {
  Heads q, k, v;
  int64_t k_step, v_step;    // bytes of the tokens that are copied at a time
  int64_t k_block, v_block;  // and of a block's
  bf16* out;                 // (T, heads, DIM)
  float* lse;                // (T, heads)
  const int* segments;
  const int* tiles;
  int* redo;                 // (programs, warps): whether a warp's sums have NaN or infinity
  int programs, kv_heads;
  Packing packing;
  float scale;               // of the scores, times log2(e)
};

// Keys key..key1-1, a block of them at a time, of which rows of the tokens low..high-1 see those up to themselves.
struct Keys {
  int segment, key, key1, low, high;
  __device__ __forceinline__ int seen_by(int token) const { return (token >= low) & (token < high) ? min(token + 1, key1) : 0; }
};

// What a block knows of its tile, in shared memory; its first thread writes it.
template <int ROWS, int KEYS>
struct Plan {
  int round, first, last, segment0, segment1, kv_head;
  // Blocks of keys that every row sees whole: the prefix's, then the segment's, if the tile is of one only.
  int whole, prefix_blocks, own_blocks;
  int prefix_rest, prefix1, own_rest;  // where the keys behind them begin, and the prefix's end
  int64_t k_gap, v_gap;                // bytes from the keys behind the prefix's whole blocks to the segment's first
  // The last whole block, then the rest of each segment, then of the prefix: the block at work, and the one behind.
  Keys rest[2];
  TileRow rows[ROWS];

  __device__ __forceinline__ void set(const QueryTile& t, const ForwardArguments& a) {
    const int* row = a.segments + static_cast<int64_t>(t.segment0) * 4;
    int start = row[0], prefix0 = row[2];
    first = t.first, last = t.last, segment0 = t.segment0, segment1 = t.segment1, kv_head = t.kv_head;
    prefix1 = t.segment0 < t.segment1 ? row[3] : prefix0;  // rows of no segment see nothing
    prefix_blocks = (prefix1 - prefix0) / KEYS;
    own_blocks = t.segment1 - t.segment0 == 1 ? (t.first - start) / KEYS : 0;
    whole = prefix_blocks + own_blocks;
    prefix_rest = prefix0 + prefix_blocks * KEYS;
    own_rest = start + own_blocks * KEYS;
    k_gap = (start - prefix_rest) * a.k.token;
    v_gap = (start - prefix_rest) * a.v.token;
    int key1 = own_blocks ? own_rest : prefix_rest;
    rest[0] = {segment0 - 1, key1 - KEYS, key1, 0, INT32_MAX};
    if (!whole) rest[0] = behind({segment0 - 1, 0, 0, 0, 0}, a.segments);
  }
  __device__ __forceinline__ int key(int block) const {
    return block < prefix_blocks ? prefix_rest - (prefix_blocks - block) * KEYS : own_rest - (whole - block) * KEYS;
  }
  // What comes behind a block of the rest; it has no keys where nothing does.
  __device__ __forceinline__ Keys behind(Keys k, const int* segments) const {
    k.key += KEYS;
    if (k.key < k.key1) return k;
    k.segment++;
    if (k.segment < segment1) {
      const int* row = segments + static_cast<int64_t>(k.segment) * 4;
      return {k.segment, k.segment == segment0 ? own_rest : row[0], min(row[1], last), row[0], row[1]};
    }
    return {k.segment, prefix_rest, k.segment == segment1 ? prefix1 : prefix_rest, 0, INT32_MAX};
  }
};

template <int DIM>
struct Forward {
  static constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 128, KEYS = DIM == 64 ? 128 : 64;
  // Of shared memory, in bytes; the weights are there in the second launch.
  static constexpr int Q = 0, K = ROWS * DIM * 2, V = K + KEYS * DIM * 2, PLAN = V + KEYS * DIM * 2;
  static constexpr int WEIGHTS = PLAN + (sizeof(attention::Plan<ROWS, KEYS>) + 15) / 16 * 16;
  static constexpr int shared(bool redo) { return WEIGHTS + (redo ? ROWS * KEYS * 2 : 0); }
  using Plan = attention::Plan<ROWS, KEYS>;
  using Copy = TileCopy<DIM, KEYS, THREADS>;
  using Scores = float[2][KEYS / 8][4];
  using Weights = uint32_t[2][4];  // of 16 keys, as left operands
};

constexpr float SLACK = 8;  // weights reach 2^SLACK: no less exact in bf16 and fp32 than up to 1

// Of a warp's rows 16 m + 8 h + lane / 4, r = 2 m + h.
template <int DIM>
struct Sums {
  float acc[2][DIM / 8][4];
  float minus_top[4], total[4];  // total of this lane's columns
  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int d = 0; d < DIM / 8; d++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[m][d][e] = 0;
#pragma unroll
    for (int r = 0; r < 4; r++) minus_top[r] = -LOWEST, total[r] = 0;
  }
};

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <int DIM>
__device__ __forceinline__ void make_scores(typename Forward<DIM>::Scores& s, const unsigned char* q,
                                            const Fragments<DIM>& at_q, const unsigned char* k, const Fragments<DIM>& at) {
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < Forward<DIM>::KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = 0;
#pragma unroll
  for (int d = 0; d < DIM / 16; d++) {
    uint32_t a[2][4], b[4];
#pragma unroll
    for (int m = 0; m < 2; m++) ldmatrix_x4(a[m], q + at_q.of(m, d));
#pragma unroll
    for (int n = 0; n < Forward<DIM>::KEYS / 16; n++) {
      ldmatrix_x4(b, k + at.of(n, d));
#pragma unroll
      for (int m = 0; m < 2; m++) {
        mma_bf16(s[m][2 * n], a[m], b[0], b[1]);
        mma_bf16(s[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Raises the maxima of those rows whose block has a score of over 2^SLACK weights, and brings their sums to it.
template <int DIM>
__device__ __forceinline__ void raise(Sums<DIM>& sums, const float (&most)[4], float scale) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
    float m = quad_max(most[r]), old = sums.minus_top[r];
    sums.minus_top[r] = fmaf(m, scale, old) > SLACK ? -__fmul_rn(m, scale) : old;
    float shrink = exp2_fast(__fsub_rn(sums.minus_top[r], old));
    sums.total[r] = __fmul_rn(sums.total[r], shrink);
#pragma unroll
    for (int d = 0; d < DIM / 8; d++)
#pragma unroll
      for (int e = 0; e < 2; e++) sums.acc[r / 2][d][r % 2 * 2 + e] = __fmul_rn(sums.acc[r / 2][d][r % 2 * 2 + e], shrink);
  }
}

// Brings the sums to maxima that serve for a block's scores.
template <int DIM>
__device__ __forceinline__ void raise_where_needed(Sums<DIM>& sums, const typename Forward<DIM>::Scores& s, float scale) {
  float most[4];
  bool rises = false;
#pragma unroll
  for (int r = 0; r < 4; r++) {
    most[r] = fmaxf(s[r / 2][0][r % 2 * 2], s[r / 2][0][r % 2 * 2 + 1]);
#pragma unroll
    for (int n = 1; n < Forward<DIM>::KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) most[r] = fmaxf(most[r], s[r / 2][n][r % 2 * 2 + e]);
    rises |= fmaf(most[r], scale, sums.minus_top[r]) > SLACK;
  }
  if (__any_sync(~0u, rises)) raise<DIM>(sums, most, scale);
}

// Weights 2^(score - top) of keys 16 k.. of a block.
template <int DIM, bool ADD>
__device__ __forceinline__ void make_weights(typename Forward<DIM>::Weights& w, Sums<DIM>& sums,
                                             const typename Forward<DIM>::Scores& s, int k, float scale) {
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {  // 8 keys from i / 2, rows of half i % 2
      int r = 2 * m + i % 2;
      float low = exp2_fast(fmaf(s[m][2 * k + i / 2][i % 2 * 2], scale, sums.minus_top[r]));
      float high = exp2_fast(fmaf(s[m][2 * k + i / 2][i % 2 * 2 + 1], scale, sums.minus_top[r]));
      if (ADD) sums.total[r] = __fadd_rn(__fadd_rn(sums.total[r], low), high);
      w[m][i] = pack_bf16(low, high);
    }
}

template <int DIM>
__device__ __forceinline__ void add_values(Sums<DIM>& sums, const typename Forward<DIM>::Scores& s,
                                           const unsigned char* v, const Fragments<DIM>& at, float scale) {
#pragma unroll
  for (int k = 0; k < Forward<DIM>::KEYS / 16; k++) {
    typename Forward<DIM>::Weights w;
    make_weights<DIM, true>(w, sums, s, k, scale);
#pragma unroll
    for (int d = 0; d < DIM / 16; d++) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v + at.of(k, d));
#pragma unroll
      for (int m = 0; m < 2; m++) {
        mma_bf16(sums.acc[m][2 * d], w[m], b[0], b[1]);
        mma_bf16(sums.acc[m][2 * d + 1], w[m], b[2], b[3]);
      }
    }
  }
}

// Rows of this lane: see Sums.
__device__ __forceinline__ int row_of(int r) { return threadIdx.x / 32 * 32 + r * 8 + threadIdx.x % 32 / 4; }

template <int DIM>
__device__ __forceinline__ void mask_scores(typename Forward<DIM>::Scores& s, const Keys& keys, const TileRow* rows) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
    int seen = keys.seen_by(rows[row_of(r)].token) - keys.key - threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < Forward<DIM>::KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (n * 8 + e >= seen) s[r / 2][n][r % 2 * 2 + e] = -INF;
  }
}

__device__ __forceinline__ float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
__device__ __forceinline__ bool finite(float x) { return fabsf(x) < INF; }

// acc += weights @ v over those values of a block that are NaN or infinite, for the rows that see them; then v has
// zeros in their place. The whole block calls it.
template <int DIM>
__device__ void add_not_finite(Sums<DIM>& sums, const typename Forward<DIM>::Scores& s, float scale,
                               const Keys& keys, const TileRow* rows, unsigned char* shared) {
  using F = Forward<DIM>;
  int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  bf16* weights = reinterpret_cast<bf16*>(shared + F::WEIGHTS) + (threadIdx.x / 32 * 32 + group) * F::KEYS;
#pragma unroll
  for (int k = 0; k < F::KEYS / 16; k++) {
    typename F::Weights w;
    make_weights<DIM, false>(w, sums, s, k, scale);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        *reinterpret_cast<uint32_t*>(weights + (2 * m + i % 2) * 8 * F::KEYS + (2 * k + i / 2) * 8 + pair * 2) = w[m][i];
  }
  __syncwarp();
  int seen[4];
#pragma unroll
  for (int r = 0; r < 4; r++) seen[r] = keys.seen_by(rows[row_of(r)].token) - keys.key;
#pragma unroll 1
  for (int j = 0; j < min(F::KEYS, keys.key1 - keys.key); j++) {
    const unsigned char* row = shared + F::V;
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) {
      uint32_t both = *reinterpret_cast<const uint32_t*>(row + Row<DIM>::at(j, d) + pair * 4);
      float v[2] = {low_half(both), high_half(both)};
      if (finite(v[0]) && finite(v[1])) continue;
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (j < seen[r] && !finite(v[e]))
            sums.acc[r / 2][d][r % 2 * 2 + e] += __bfloat162float(weights[r * 8 * F::KEYS + j]) * v[e];
    }
  }
  __syncthreads();
  auto* words = reinterpret_cast<uint32_t*>(shared + F::V);
  for (int i = threadIdx.x; i < F::KEYS * DIM / 2; i += F::THREADS) {
    uint32_t word = words[i];
    words[i] = (finite(low_half(word)) ? word & 0xffffu : 0) | (finite(high_half(word)) ? word & 0xffff0000u : 0);
  }
  __syncthreads();
}

// 32 rows of Q to a warp's part of shared memory.
template <int DIM>
__device__ __forceinline__ void copy_queries(const Heads& q, const TileRow* rows, unsigned char* to) {
  constexpr int CHUNKS = Row<DIM>::CHUNKS, STEP = 32 / CHUNKS;
  int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
#pragma unroll 4
  for (int i = 0; i < 32 / STEP; i++) {
    int row = threadIdx.x / 32 * 32 + i * STEP + lane / CHUNKS;
    TileRow at = rows[row];
    cp_async16(to + Row<DIM>::at(row, chunk), q.at + (at.token * q.token + at.head * q.head + chunk * 16), at.token >= 0);
  }
}

// out and lse of a warp's rows, by way of its part of shared memory, where Q was.
template <int DIM, bool REDO>
__device__ __forceinline__ void store(const ForwardArguments& a, const typename Forward<DIM>::Plan& plan, Sums<DIM>& sums,
                                      int program, unsigned char* q) {
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
      add_values<DIM>(sums, s, shared + F::V, at_v, a.scale);
    }
  }
  bool more = true;
  for (int turn = 0; more; turn ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    Keys now = plan.rest[turn];
    Copy::copy(to_v, Copy::from(a.v, plan.kv_head, now.key), a.v_step, now.key1 - now.key);
    cp_async_commit();
    if (threadIdx.x == 0) plan.rest[turn ^ 1] = plan.behind(now, a.segments);
    __syncwarp();
    make_scores<DIM>(s, shared + F::Q + q_at, at_v, shared + F::K, at_k);
    cp_async_wait<0>();
    __syncthreads();
    Keys next = plan.rest[turn ^ 1];
    more = next.key < next.key1;
    if (more) Copy::copy(to_k, Copy::from(a.k, plan.kv_head, next.key), a.k_step, next.key1 - next.key);
    cp_async_commit();
    mask_scores<DIM>(s, plan.rest[turn], plan.rows);
    raise_where_needed<DIM>(sums, s, a.scale);
    if (REDO) add_not_finite<DIM>(sums, s, a.scale, plan.rest[turn], plan.rows, shared);
    add_values<DIM>(sums, s, shared + F::V, at_v, a.scale);
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
                     F::Copy::STEP * k_token * 2, F::Copy::STEP * v_token * 2, F::KEYS * k_token * 2, F::KEYS * v_token * 2,
                     static_cast<bf16*>(out), static_cast<float*>(lse), static_cast<const int*>(segments),
                     static_cast<const int*>(tiles), static_cast<int*>(redo),
                     static_cast<int>(num_tiles) * kv_heads * chunks, kv_heads, {ratio, pack, chunks}, scale_log2};
  dim3 grid(static_cast<unsigned>(min(a.programs, blocks)));
  int raised = SIMT_LAUNCH((attention_forward<DIM, false>), grid, dim3(F::THREADS), F::shared(false), stream, a);
  if (raised) return raised;
  return SIMT_LAUNCH((attention_forward<DIM, true>), grid, dim3(F::THREADS), F::shared(true), stream, a);
}

}  // namespace attention
