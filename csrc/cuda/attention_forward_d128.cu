// attention's forward for head dim 128.
#include "attention_forward.cuh"

extern "C" int hps_attention_forward_d128(
    const void* q, const void* k, const void* v, void* out, void* lse, const void* segments, const void* tiles,
    void* redo, int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,
    int64_t num_tiles, int kv_heads, int ratio, int pack, float scale_log2, int blocks, void* stream) {
  return attention::launch_forward<128>(q, k, v, out, lse, segments, tiles, redo, q_token, q_head, k_token, k_head,
                                       v_token, v_head, num_tiles, kv_heads, ratio, pack, scale_log2, blocks, stream);
}
