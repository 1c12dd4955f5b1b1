// 128 keys a block, 1 block on an SM.
#include "attention_backward_keys.cuh"

extern "C" int hps_attention_backward_keys_d128(
    const void* grad, const void* q, const void* k, const void* v, int64_t grad_token, int64_t grad_head,
    int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, const void* lse,
    const void* delta, const void* segments, const void* tiles, const void* runs, int64_t num_tiles, int64_t tokens,
    int kv_heads, int chunks, int log_pack, double scale, void* dk, void* dv, void* stream) {
  using attention::heads;
  return attention::launch_keys<128, 8, 2, 14, 32, 1>(
      heads(grad, grad_token, grad_head), heads(q, q_token, q_head), heads(k, k_token, k_head),
      heads(v, v_token, v_head), lse, delta, segments, tiles, runs, num_tiles, tokens, kv_heads, chunks, log_pack,
      scale, dk, dv, stream);
}
