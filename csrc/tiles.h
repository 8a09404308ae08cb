// The matrix tiles of AMX: 16 rows of 64 bytes each, one instruction for 16 x 16 sums over 32 bf16 pairs of k.
#pragma once
#if defined(__AMX_BF16__)
#include <immintrin.h>

#include <cstdint>

namespace PCS_ISA {

// The compiler does not know what the tile instructions read: this has all of it in memory before they do.
inline void written(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// Which shapes this thread's tiles have. Whoever else uses them (oneDNN) sets their own, so ours last one task list.
inline thread_local int tile_shapes = 0;

// Tiles 0, 1 (sums) and 4 (rows of A) are `first` rows high, tiles 2, 3 and 5 `second`; 6 and 7 hold columns of B.
inline void shape_tiles(int first, int second) {
  const int wanted = first * 32 + second;
  if (tile_shapes == wanted) return;
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_a_row[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; tile++) config.bytes_a_row[tile] = 64;
  for (int tile : {0, 1, 4}) config.rows[tile] = uint8_t(first);
  for (int tile : {2, 3, 5}) config.rows[tile] = uint8_t(second ? second : 16);
  for (int tile : {6, 7}) config.rows[tile] = 16;
  written(&config);
  _tile_loadconfig(&config);
  tile_shapes = wanted;
}

inline void release_tiles() {
  if (tile_shapes) _tile_release();
  tile_shapes = 0;
}

}  // namespace PCS_ISA
#endif
