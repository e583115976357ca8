// Integer products for data/kernels.cpp: activations are rounded to int8, multiplied with a matrix of 8 or 4 bits,
// summed in int32, and scaled: exactly IntLinear of data/rounding.py. Most functions are plain loops, which the
// compiler vectorises; dots is written with vector instructions (vpdpbusd multiplies 64 bytes and adds them up in
// fours). The result for a token never depends on the tokens beside it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// e^x, accurate to the last digits of a float (Cephes); calls of std::exp would not be vectorised.
static inline float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
  float n = std::nearbyint(x * 1.44269504f);
  float f = x - n * 0.693359375f + n * 2.12194440e-4f;              // x = n log(2) + f
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;                                         // e^f; adding n to its exponent multiplies by 2^n
  int32_t bits;
  std::memcpy(&bits, &p, 4);
  bits += (int32_t)n << 23;
  std::memcpy(&p, &bits, 4);
  return p;
}

#ifdef __AVX512F__
// The sum of the sixteen numbers in each of four vectors, for integers and for floats.
static inline __m128i added_up(const __m512i* x) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

static inline __m128 added_up(const __m512* x) {
  __m512d a = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1])));
  __m512d b = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3])));
  __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), high = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  __m512 all = _mm512_add_ps(low, high);
  __m512 upper = _mm512_shuffle_f32x4(all, all, 0xee);
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_castps512_ps256(upper));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

// The factor by which model.norm multiplies x (n,).
static float norm_factor(const float* x, int n, float eps) {
  float sum = 0;
  #pragma omp simd reduction(+:sum)
  for (int i = 0; i < n; i++) sum += x[i] * x[i];
  return 1 / std::sqrt(sum / n + eps);
}

// One step of hadamard on sixteen numbers, which stay in a register: numbers i and i + half become their sum and their
// difference.
template <int half> static inline void butterflies(float* z) {
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = z[i ^ half] + (i & half ? -z[i] : z[i]);
  std::memcpy(z, out, sizeof out);
}

// model.hadamard of z (K,), in place: sums and differences of neighbours, of pairs of them, and so on.
static void hadamard(float* z, int K, int n) {
  int half = 1;
  if (n >= 16) {
    for (int i = 0; i < K; i += 16) {
      butterflies<1>(z + i);
      butterflies<2>(z + i);
      butterflies<4>(z + i);
      butterflies<8>(z + i);
    }
    half = 16;
  }
  for (; half < n; half *= 2)
    for (int first = 0; first < K; first += 2 * half)
      for (int i = first; i < first + half; i++) {
        float a = z[i], b = z[i + half];
        z[i] = a + b;
        z[i + half] = a - b;
      }
}

// What a matrix reads: x itself, its norm, relu(x)^2, or silu(gate) * hidden, where x is gate and hidden concatenated.
// If turned is not 0, the result is turned by Hadamard matrices of that size.
enum Input { AS_IT_IS, NORM, RELU2, SWIGLU };

static void prepare(const float* x, float* z, int K, int input, int turned, float eps) {
  float factor = input == NORM ? norm_factor(x, K, eps) : 1;
  if (input == RELU2)
    for (int k = 0; k < K; k++) z[k] = x[k] > 0 ? x[k] * x[k] : 0;
  else if (input == SWIGLU)
    #pragma omp simd
    for (int k = 0; k < K; k++) z[k] = x[k] / (1 + exp_of(-x[k])) * x[K + k];
  else
    for (int k = 0; k < K; k++) z[k] = x[k] * factor;
  hadamard(z, K, turned);
}

// data/rounding.round_rows of z (K,): writes the integers plus zero to out (K,) -> their scale.
static float round_row(const float* z, uint8_t* out, int K, int zero) {
  float peak = 1e-12f;
  #pragma omp simd reduction(max:peak)
  for (int k = 0; k < K; k++) peak = std::fabs(z[k]) > peak ? std::fabs(z[k]) : peak;
  float up = 1 / peak * 127;                                        // PyTorch's 127 / peak, to the bit
  for (int k = 0; k < K; k++) out[k] = (uint8_t)((int32_t)std::nearbyint(z[k] * up) + zero);
  return peak / 127;
}

// Called by all threads of a parallel region: prepares the rows of x (M, K or 2 K) and rounds them -> xq (M, K), the
// integers plus zero, and xs (M,), their scales.
static void round_together(const float* x, uint8_t* xq, float* xs, int M, int K, int input, int turned, float eps,
                           int zero = 128) {
  static thread_local std::vector<float> room;
  room.resize(K);
  float* z = room.data();
  #pragma omp for schedule(static)
  for (int m = 0; m < M; m++) {
    prepare(x + (size_t)m * (input == SWIGLU ? 2 * K : K), z, K, input, turned, eps);
    xs[m] = round_row(z, xq + (size_t)m * K, K, zero);
  }
}

extern "C" void round_rows(const float* x, int8_t* xq, float* xs, int M, int K, int input, int turned, float eps) {
  #pragma omp parallel
  round_together(x, (uint8_t*)xq, xs, M, K, input, turned, eps, 0);
}

// The products of the steps -18, ..., 18 with the sixteen values of 4 bits: one instruction looks up many of them.
static const struct Table {
  int8_t values[37][16];
  Table() { for (int s = 0; s < 37; s++) for (int q = 0; q < 16; q++) values[s][q] = (int8_t)((q - 8) * (s - 18)); }
  const int8_t* of(int step) const { return values[step + 18]; }
} table;

static int shift_of(int group) { return group == 32 ? 5 : group == 64 ? 6 : 7; }    // a division would take longer

#ifdef __AVX2__
static __m256i table_of(int step) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table.of(step)));
}
#endif

// A row of 4 bits, packed as by data/rounding.pack, and its groups' steps -> the int8 values v (K,).
static void unpack_row(const uint8_t* w, const int8_t* step, int8_t* v, int K, int group) {
  int half = K / 2, shift = shift_of(group);
  for (int k = 0; k < half; k += 32) {
    int low = step[k >> shift], high = step[(half + k) >> shift];
#ifdef __AVX2__
    __m256i bytes = _mm256_loadu_si256((const __m256i*)(w + k)), four_bits = _mm256_set1_epi8(15);
    __m256i left = _mm256_and_si256(bytes, four_bits);
    __m256i right = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four_bits);
    _mm256_storeu_si256((__m256i*)(v + k), _mm256_shuffle_epi8(table_of(low), left));
    _mm256_storeu_si256((__m256i*)(v + half + k), _mm256_shuffle_epi8(table_of(high), right));
#else
    for (int i = k; i < k + 32; i++) {
      v[i] = table.of(low)[w[i] & 15];
      v[half + i] = table.of(high)[w[i] >> 4];
    }
#endif
  }
}

// Unpacks all rows of a 4-bit matrix -> v (N, K).
extern "C" void unpack(const uint8_t* w, const int8_t* step, int8_t* v, int N, int K, int group) {
  #pragma omp parallel for schedule(static)
  for (int n = 0; n < N; n++)
    unpack_row(w + (size_t)n * (K / 2), step + (size_t)n * (K / group), v + (size_t)n * K, K, group);
}

// An integer matrix (rows, cols): int8, or 4 bits if group is not 0. sums (rows,): the sum of each row, to correct for
// the 128 that is added to the activations. data/kernels.py has the same struct.
struct Matrix {
  const uint8_t* weights;
  const int8_t* step;
  const int32_t* sums;
  const float* scale;
  int rows, cols, group;
};

// Multiplies four rows of a matrix, from row n on, with R rows of activations u, which lie m.cols apart -> the sums of
// activation row r, from sums + 8 r on. Whatever is read of u serves four rows, and of the matrix R rows.
#ifdef __AVX512VNNI__
static const __mmask64 ALL = ~(__mmask64)0;

static inline __m512i read(const void* at, __mmask64 inside) {
  return inside == ALL ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(inside, at);
}

// adds the products of 64 columns from k on (or those in the mask inside) of four rows of weights v and R rows of u
template <int R> static inline void add(__m512i (*sum)[4], const uint8_t* u, int K, int k, const __m512i* v,
                                        __mmask64 inside) {
  for (int r = 0; r < R; r++) {
    __m512i few = read(u + (size_t)r * K + k, inside);
    for (int i = 0; i < 4; i++) sum[r][i] = _mm512_dpbusd_epi32(sum[r][i], few, v[i]);
  }
}

// The same for 4 bits: bytes that hold the columns k, ..., k + 63 and those half a row further on. The products of 4
// bits and steps are looked up.
template <int R> static inline void add4(__m512i (*sum)[4], const uint8_t* u, int K, int k, const uint8_t* const* w,
                                         const int8_t* const* step, int shift, __mmask64 inside) {
  for (int side = 0; side < 2; side++) {
    int first = side * K / 2 + k, second = inside == ALL ? first + 32 : first;
    __m512i v[4];
    for (int i = 0; i < 4; i++) {
      __m512i bytes = read(w[i] + k, inside);
      __m512i q = _mm512_and_si512(side ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
      __m256i low = table_of(step[i][first >> shift]), high = table_of(step[i][second >> shift]);
      v[i] = _mm512_shuffle_epi8(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), q);
    }
    add<R>(sum, u, K, first, v, inside);
  }
}

template <int R> static void dots(const Matrix& m, int n, const uint8_t* u, int32_t* sums) {
  const int K = m.cols, columns = m.group ? K / 2 : K, shift = shift_of(m.group);
  const uint8_t* w[4];
  const int8_t* step[4];
  for (int i = 0; i < 4; i++) {
    int row = std::min(n + i, m.rows - 1);                          // after the last row, read it again
    w[i] = m.weights + (size_t)row * columns;
    step[i] = m.group ? m.step + (size_t)row * (K / m.group) : nullptr;
  }
  __m512i sum[R][4];
  for (auto& of_row : sum)
    for (auto& s : of_row) s = _mm512_setzero_si512();
  auto read_columns = [&](int k, __mmask64 inside) {
    // prefetch rows that come later, a little with every product: many requests at once would have to be waited for
    for (int i = 0; i < 4; i++) _mm_prefetch((const char*)w[i] + k + 12 * columns, _MM_HINT_T1);
    if (m.group) return add4<R>(sum, u, K, k, w, step, shift, inside);
    __m512i v[4];
    for (int i = 0; i < 4; i++) v[i] = read(w[i] + k, inside);
    add<R>(sum, u, K, k, v, inside);
  };
  int k = 0;
  for (; k + 64 <= columns; k += 64) read_columns(k, ALL);
  if (k < columns) read_columns(k, ((__mmask64)1 << (columns - k)) - 1);
  for (int r = 0; r < R; r++)
    _mm_storeu_si128((__m128i*)(sums + 8 * r), added_up(sum[r]));
}
#elif defined(__AVX2__)
// Adds 32 products to eight partial sums: of weights v, whose absolute values are size, and activations x. Without VNNI
// two products are first added up in 16 bits, which hold 2 * 128 * 127, but not the 255 of an activation plus 128.
static inline __m256i add_products(__m256i sum, __m256i v, __m256i size, __m256i x) {
  __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, v));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

static inline int32_t added_up(__m256i x) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// Two of the four rows, w, of which the matrix has the numbers row.
template <int R> static inline void dots_of_two(const Matrix& m, const int* row, const uint8_t* u, int32_t* sums) {
  const int K = m.cols, columns = m.group ? K / 2 : K, shift = shift_of(m.group);
  const uint8_t* w[2];
  const int8_t* step[2];
  for (int i = 0; i < 2; i++) {
    w[i] = m.weights + (size_t)row[i] * columns;
    step[i] = m.group ? m.step + (size_t)row[i] * (K / m.group) : nullptr;
  }
  __m256i sum[R][2], v[2], size[2];
  for (auto& of_row : sum) of_row[0] = of_row[1] = _mm256_setzero_si256();
  auto add = [&](int k) {                                           // 32 columns from k on
    for (int i = 0; i < 2; i++) size[i] = _mm256_abs_epi8(v[i]);
    for (int r = 0; r < R; r++) {
      __m256i x = _mm256_loadu_si256((const __m256i*)(u + (size_t)r * K + k));
      x = _mm256_xor_si256(x, _mm256_set1_epi8(-128));              // minus 128
      for (int i = 0; i < 2; i++) sum[r][i] = add_products(sum[r][i], v[i], size[i], x);
    }
  };
  int k = 0;
  for (; k + 32 <= columns; k += 32) {
    for (int i = 0; i < 2; i++) _mm_prefetch((const char*)w[i] + k + 12 * columns, _MM_HINT_T1);
    for (int side = 0; side < (m.group ? 2 : 1); side++) {
      for (int i = 0; i < 2; i++) {
        v[i] = _mm256_loadu_si256((const __m256i*)(w[i] + k));
        if (!m.group) continue;
        __m256i q = _mm256_and_si256(side ? _mm256_srli_epi16(v[i], 4) : v[i], _mm256_set1_epi8(15));
        v[i] = _mm256_shuffle_epi8(table_of(step[i][(side * columns + k) >> shift]), q);
      }
      add(side * columns + k);
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 2; i++) {
      int32_t total = added_up(sum[r][i]);
      for (int at = m.group ? K : k; at < K; at++) total += (u[(size_t)r * K + at] - 128) * (int8_t)w[i][at];
      sums[8 * r + i] = total + 128 * m.sums[row[i]];               // as if u had been multiplied
    }
}

template <int R> static void dots(const Matrix& m, int n, const uint8_t* u, int32_t* sums) {
  for (int i = 0; i < 4; i += 2) {
    int row[2] = {std::min(n + i, m.rows - 1), std::min(n + i + 1, m.rows - 1)};    // after the last row, read it again
    dots_of_two<R>(m, row, u, sums + i);
  }
}
#else
template <int R> static void dots(const Matrix& m, int n, const uint8_t* u, int32_t* sums) {
  static thread_local std::vector<int8_t> unpacked;
  const int K = m.cols;
  for (int i = 0; i < 4 && n + i < m.rows; i++) {
    const int8_t* v = (const int8_t*)m.weights + (size_t)(n + i) * K;
    if (m.group) {
      unpacked.resize(K);
      unpack_row(m.weights + (size_t)(n + i) * (K / 2), m.step + (size_t)(n + i) * (K / m.group), unpacked.data(), K,
                 m.group);
      v = unpacked.data();
    }
    for (int r = 0; r < R; r++) {
      int32_t sum = 0;
      for (int k = 0; k < K; k++) sum += (int32_t)u[(size_t)r * K + k] * (int32_t)v[k];
      sums[8 * r + i] = sum;
    }
  }
}
#endif

// dots for any number M of activation rows, at most five at once, so that the sums stay in registers.
static void dots_of(const Matrix& m, int n, const uint8_t* u, int M, int32_t* sums) {
  for (; M > 5; M -= 4, u += (size_t)4 * m.cols, sums += 8 * 4) dots<4>(m, n, u, sums);
  switch (M) {
    case 1: return dots<1>(m, n, u, sums);
    case 2: return dots<2>(m, n, u, sums);
    case 3: return dots<3>(m, n, u, sums);
    case 4: return dots<4>(m, n, u, sums);
    case 5: return dots<5>(m, n, u, sums);
  }
}

// Called by all threads of a parallel region: IntLinear of xq and xs -> y (M, rows). rest (M, rows), which may be y
// itself or nullptr, is added.
static void multiply(const Matrix& m, const uint8_t* xq, const float* xs, const float* rest, float* y, int M) {
  std::vector<int32_t> sums((size_t)8 * M);                         // (M, 8)
  #pragma omp for schedule(static)
  for (int first = 0; first < m.rows; first += 8) {
    int end = first + 8 < m.rows ? first + 8 : m.rows;
    for (int n = first; n < end; n += 4) dots_of(m, n, xq, M, sums.data() + n - first);
    for (int r = 0; r < M; r++) {
      const int32_t* sum = sums.data() + 8 * r - first;
      for (int n = first; n < end; n++) {
        size_t at = (size_t)r * m.rows + n;
        float product = (float)(sum[n] - 128 * m.sums[n]) * m.scale[n] * xs[r];
        y[at] = rest ? product + rest[at] : product;
      }
    }
  }
}

// IntLinear of x, to which input (see prepare) is applied before -> y (M, rows). It takes 64 rows at a time: their
// integers stay near the processor while a matrix is read.
extern "C" void int_linear(const Matrix* m, const float* x, const float* rest, float* y, int M, int input, int turned,
                           float eps) {
  const size_t rows = m->rows, cols = m->cols;
  std::vector<uint8_t> xq(M * cols);
  std::vector<float> xs(M);
  #pragma omp parallel
  {
    round_together(x, xq.data(), xs.data(), M, m->cols, input, turned, eps);
    for (int r = 0; r < M; r += 64)
      multiply(*m, &xq[r * cols], &xs[r], rest ? rest + r * rows : nullptr, y + r * rows, std::min(64, M - r));
  }
}
