// Products of a few or many rows of fp32 with a matrix of 4- or 8-bit levels, in tiles of 16 outputs; see integer_tiles.py.
//
// The rows are rounded to 8 bits, each block of 32 inputs by a step of its own. Of a block the products of levels and integers
// are summed exactly, in 32 bits.
#ifndef ARRIERO_INTEGER_PRODUCT_H
#define ARRIERO_INTEGER_PRODUCT_H

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#if defined(ARRIERO_VNNI) || defined(ARRIERO_AVX2)
#include <immintrin.h>
#endif

namespace arriero {

constexpr int kBlock = 32;  // inputs that share a step
constexpr int kLanes = 16;  // outputs of a tile
constexpr int kRows = 8;    // that share a loop over a tile
constexpr float kLeast = 1e-36f;

// Rows of a product as integers, and of each block its step and the sum of what the integers stand for.
struct RoundedRows {
  const int8_t* integers;
  const float* steps;
  const float* sums;
};

// A tile: `bits / 8 * 512` bytes, and 16 steps and 16 lows in fp16, of each block; and a factor of each output.
struct Tile {
  const uint8_t* levels;
  const uint16_t* steps;
  const float* factors;
};

inline void round_row(const float* x, int64_t size, int64_t blocks, int8_t* integers, float* steps, float* sums) {
  for (int64_t b = 0; b < blocks; ++b) {
    const int count = size - b * kBlock < kBlock ? static_cast<int>(size - b * kBlock) : kBlock;
    float block[kBlock] = {};
    std::memcpy(block, x + b * kBlock, count * sizeof(float));
    float most[kLanes] = {};
    int odd[kLanes] = {};  // neither finite
    for (int i = 0; i < kBlock; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float value = std::fabs(block[i + lane]);
        most[lane] = value > most[lane] ? value : most[lane];
        odd[lane] |= !(value <= FLT_MAX);
      }
    float largest = 0;
    int any = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      largest = most[lane] > largest ? most[lane] : largest;
      any |= odd[lane];
    }
    if (any || largest < kLeast) {  // no number, as the products then are; or too small for an inverse
      std::memset(integers + b * kBlock, 0, kBlock);
      steps[b] = sums[b] = any ? NAN : 0.0f;
      continue;
    }
    const float step = largest / 127.0f, inverse = 127.0f / largest;
    int values[kBlock];
    for (int i = 0; i < kBlock; ++i) values[i] = static_cast<int>(std::nearbyint(block[i] * inverse));
    int sum = 0;
    for (int i = 0; i < kBlock; ++i) sum += values[i];
    for (int i = 0; i < kBlock; ++i) integers[b * kBlock + i] = static_cast<int8_t>(values[i]);
    steps[b] = step;
    sums[b] = step * static_cast<float>(sum);
  }
}

#if defined(ARRIERO_VNNI)

#define ARRIERO_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

template <int bits, int rows>
ARRIERO_TARGET inline void tile_product(
    const Tile& tile, const RoundedRows& x, int64_t blocks, float (*y)[kLanes]) {
  const __m512i low_bits = _mm512_set1_epi8(15);
  __m512 found[rows];
  for (int r = 0; r < rows; ++r) found[r] = _mm512_setzero_ps();
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* levels = tile.levels + b * (bits * 64);
    __m512i sums[rows];
    for (int r = 0; r < rows; ++r) sums[r] = _mm512_setzero_si512();
    for (int part = 0; part < bits; ++part) {
      const __m512i line = _mm512_loadu_si512(levels + 64 * part);
      for (int r = 0; r < rows; ++r) {
        const int8_t* own = x.integers + (r * blocks + b) * kBlock;
        int four;
        if (bits == 8) {
          std::memcpy(&four, own + 4 * part, 4);
          sums[r] = _mm512_dpbusd_epi32(sums[r], line, _mm512_set1_epi32(four));
        } else {
          std::memcpy(&four, own + 8 * part, 4);
          sums[r] = _mm512_dpbusd_epi32(sums[r], _mm512_and_si512(line, low_bits), _mm512_set1_epi32(four));
          std::memcpy(&four, own + 8 * part + 4, 4);
          const __m512i high = _mm512_and_si512(_mm512_srli_epi16(line, 4), low_bits);
          sums[r] = _mm512_dpbusd_epi32(sums[r], high, _mm512_set1_epi32(four));
        }
      }
    }
    const auto halves = reinterpret_cast<const __m256i*>(tile.steps + b * 2 * kLanes);
    const __m512 step = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
    const __m512 low = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
    for (int r = 0; r < rows; ++r) {
      const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r]), _mm512_set1_ps(x.steps[r * blocks + b]));
      found[r] = _mm512_fmadd_ps(scaled, step, found[r]);
      found[r] = _mm512_fmadd_ps(low, _mm512_set1_ps(x.sums[r * blocks + b]), found[r]);
    }
  }
  const __m512 factors = _mm512_loadu_ps(tile.factors);
  for (int r = 0; r < rows; ++r) _mm512_storeu_ps(y[r], _mm512_mul_ps(found[r], factors));
}

#elif defined(ARRIERO_AVX2)

#define ARRIERO_TARGET __attribute__((target("avx2,fma,f16c")))

// Adds, to 8 sums, the products of 8 times 4 levels, which are below 128 or signed, with 4 integers.
ARRIERO_TARGET inline __m256i add_products(__m256i sums, __m256i levels, __m256i integers, bool is_signed) {
  // pairs stay below 2^15: 2 * 15 * 127, or 2 * 128 * 127
  const __m256i size = is_signed ? _mm256_abs_epi8(levels) : levels;
  const __m256i other = is_signed ? _mm256_sign_epi8(integers, levels) : integers;
  return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(size, other), _mm256_set1_epi16(1)));
}

template <int bits, int rows>
ARRIERO_TARGET inline void tile_product(
    const Tile& tile, const RoundedRows& x, int64_t blocks, float (*y)[kLanes]) {
  const __m256i low_bits = _mm256_set1_epi8(15), top = _mm256_set1_epi8(static_cast<char>(0x80));
  for (int half = 0; half < 2; ++half) {
    __m256 found[rows];
    for (int r = 0; r < rows; ++r) found[r] = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* levels = tile.levels + b * (bits * 64) + 32 * half;
      __m256i sums[rows];
      for (int r = 0; r < rows; ++r) sums[r] = _mm256_setzero_si256();
      for (int part = 0; part < bits; ++part) {
        const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels + 64 * part));
        for (int r = 0; r < rows; ++r) {
          const int8_t* own = x.integers + (r * blocks + b) * kBlock;
          int four;
          if (bits == 8) {
            std::memcpy(&four, own + 4 * part, 4);
            sums[r] = add_products(sums[r], _mm256_xor_si256(line, top), _mm256_set1_epi32(four), true);
          } else {
            std::memcpy(&four, own + 8 * part, 4);
            sums[r] = add_products(sums[r], _mm256_and_si256(line, low_bits), _mm256_set1_epi32(four), false);
            std::memcpy(&four, own + 8 * part + 4, 4);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(line, 4), low_bits);
            sums[r] = add_products(sums[r], high, _mm256_set1_epi32(four), false);
          }
        }
      }
      const auto halves = reinterpret_cast<const __m128i*>(tile.steps + b * 2 * kLanes + 8 * half);
      const __m256 step = _mm256_cvtph_ps(_mm_loadu_si128(halves));
      __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(halves + 2));
      if (bits == 8) low = _mm256_fmadd_ps(step, _mm256_set1_ps(128.0f), low);  // what the signed levels lack
      for (int r = 0; r < rows; ++r) {
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r]), _mm256_set1_ps(x.steps[r * blocks + b]));
        found[r] = _mm256_fmadd_ps(scaled, step, found[r]);
        found[r] = _mm256_fmadd_ps(low, _mm256_set1_ps(x.sums[r * blocks + b]), found[r]);
      }
    }
    const __m256 factors = _mm256_loadu_ps(tile.factors + 8 * half);
    for (int r = 0; r < rows; ++r) _mm256_storeu_ps(y[r] + 8 * half, _mm256_mul_ps(found[r], factors));
  }
}

#else

inline float from_half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(fraction), -24);
  const uint32_t whole = sign | ((exponent + 112) << 23) | (fraction << 13);
  float found;
  std::memcpy(&found, &whole, 4);
  return found;
}

template <int bits, int rows>
inline void tile_product(const Tile& tile, const RoundedRows& x, int64_t blocks, float (*y)[kLanes]) {
  for (int r = 0; r < rows; ++r) {
    float found[kLanes] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const uint8_t* levels = tile.levels + b * (bits * 64);
      const int8_t* own = x.integers + (r * blocks + b) * kBlock;
      int sums[kLanes] = {};
      for (int part = 0; part < bits; ++part) {
        for (int lane = 0; lane < kLanes; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int level = levels[64 * part + 4 * lane + i];
            sums[lane] += bits == 8 ? level * own[4 * part + i]
                                    : (level & 15) * own[8 * part + i] + (level >> 4) * own[8 * part + 4 + i];
          }
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const float step = from_half(tile.steps[b * 2 * kLanes + lane]);
        const float low = from_half(tile.steps[b * 2 * kLanes + kLanes + lane]);
        found[lane] += static_cast<float>(sums[lane]) * x.steps[r * blocks + b] * step + low * x.sums[r * blocks + b];
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) y[r][lane] = found[lane] * tile.factors[lane];
  }
}

#endif

template <int bits, int rows>
inline void store_rows(
    const Tile& tile, const RoundedRows& x, int64_t blocks, float* y, int64_t outputs, int64_t first) {
  alignas(64) float found[rows][kLanes];
  tile_product<bits, rows>(tile, x, blocks, found);
  const int64_t count = outputs - first < kLanes ? outputs - first : kLanes;
  for (int r = 0; r < rows; ++r) std::memcpy(y + r * outputs + first, found[r], count * sizeof(float));
}

// (rows, inputs) -> (rows, outputs)
template <int bits>
void integer_product(
    const float* x, const uint8_t* levels, const uint16_t* steps, const float* factors, float* y, int64_t rows,
    int64_t inputs, int64_t outputs) {
  const int64_t blocks = (inputs + kBlock - 1) / kBlock, tiles = (outputs + kLanes - 1) / kLanes;
  const std::unique_ptr<int8_t[]> integers(new int8_t[rows * blocks * kBlock]);
  const std::unique_ptr<float[]> numbers(new float[2 * rows * blocks]);
  float* const row_steps = numbers.get();
  float* const row_sums = row_steps + rows * blocks;
  const auto round = [&](int64_t r) {
    round_row(
        x + r * inputs, inputs, blocks, integers.get() + r * blocks * kBlock, row_steps + r * blocks,
        row_sums + r * blocks);
  };
  if (rows <= kRows) {
    for (int64_t r = 0; r < rows; ++r) round(r);
  } else {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; ++r) round(r);
  }
#pragma omp parallel for
  for (int64_t t = 0; t < tiles; ++t) {
    const Tile tile{levels + t * blocks * bits * 64, steps + t * blocks * 2 * kLanes, factors + t * kLanes};
    const auto part = [&](int64_t r) {
      return RoundedRows{integers.get() + r * blocks * kBlock, row_steps + r * blocks, row_sums + r * blocks};
    };
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows)
      store_rows<bits, kRows>(tile, part(r), blocks, y + r * outputs, outputs, t * kLanes);
    for (; r + 4 <= rows; r += 4) store_rows<bits, 4>(tile, part(r), blocks, y + r * outputs, outputs, t * kLanes);
    for (; r + 2 <= rows; r += 2) store_rows<bits, 2>(tile, part(r), blocks, y + r * outputs, outputs, t * kLanes);
    for (; r < rows; ++r) store_rows<bits, 1>(tile, part(r), blocks, y + r * outputs, outputs, t * kLanes);
  }
}

}  // namespace arriero

#endif
