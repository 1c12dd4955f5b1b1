// paged_attention's passes for head dim 128. A head dim is a file of its own: they are compiled side by side.
#include "paged_attention.cuh"

extern "C" int hps_paged_own_128(
    const void* q, const void* k, const void* v, const void* table, const void* lens, void* out, void* top, void* total,
    int64_t heads, int64_t kv_heads, int64_t columns, int64_t page_size, int64_t slots, int64_t splits, int64_t k_page,
    int64_t k_slot, int64_t k_head, int64_t v_page, int64_t v_slot, int64_t v_head, float scale, int64_t batch,
    int64_t slot0, void* stream) {
  paged::Arguments a{q,         k,     v,      table,  lens,   out,    top,    total,  heads, kv_heads, columns,
                     page_size, slots, splits, k_page, k_slot, k_head, v_page, v_slot, v_head, scale};
  return paged::launch_own<128>(a, batch, slot0, stream);
}

extern "C" int hps_paged_prefixes_128(
    const void* q, const void* k, const void* v, const void* table, const void* lens, void* out, void* top, void* total,
    int64_t heads, int64_t kv_heads, int64_t columns, int64_t page_size, int64_t slots, int64_t splits, int64_t k_page,
    int64_t k_slot, int64_t k_head, int64_t v_page, int64_t v_slot, int64_t v_head, float scale, const void* order,
    const void* bounds, const void* group_of_tile, int64_t tiles, void* stream) {
  paged::Arguments a{q,         k,     v,      table,  lens,   out,    top,    total,  heads, kv_heads, columns,
                     page_size, slots, splits, k_page, k_slot, k_head, v_page, v_slot, v_head, scale};
  return paged::launch_prefixes<128>(a, static_cast<const int*>(order), static_cast<const int*>(bounds),
                                    static_cast<const int*>(group_of_tile), tiles, stream);
}
