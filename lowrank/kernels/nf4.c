/* NF4: codes from weights, weights from codes, and products with few tokens straight from the codes.

   Two codes lie in a byte, the first one in the high bits. `levels` are the 16 values of the codes, `bounds` the 15
   midpoints between them, padded to 16; both come from the caller, so that no number stands twice. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "threads.h"
#include "tokens.h"

/* Entries that one thread takes at least; every block size divides it. */
#define UNIT 4096
/* Entries that are decoded together; it divides every block size. */
#define CHUNK 64
/* Entries of an output that leaves the caches before it is read. */
#define BEYOND_CACHES (1 << 23)

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));

/* ---- Quantize ---------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t numel, block;
    const float *values, *bounds;
    uint8_t *packed;
    float *absmax;
} Quantize;

static float largest(const float *x, int64_t n) {
    int32_t found = 0; /* bits of |x|: they rise with |x|, and integer maxima vectorise */
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        found = bits > found ? bits : found;
    }
    float value;
    memcpy(&value, &found, sizeof value);
    return value;
}

static inline int code_of(float v, const float *bounds) {
    int code = 0;
    for (int k = 0; k < 15; k++) code += v > bounds[k];
    return code;
}

/* Codes of x · inverse, CHUNK of them. */
static inline void quantize_chunk(const float *x, float inverse, const float *bounds, uint8_t *packed) {
#ifdef __AVX512F__
    /* A binary search in a register: `position` counts the bounds below v. */
    const __m512 all = _mm512_loadu_ps(bounds), eighth = _mm512_set1_ps(bounds[7]), scale = _mm512_set1_ps(inverse);
    for (int k = 0; k < CHUNK / 16; k++) {
        const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * k), scale);
        __m512i position = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, eighth, _CMP_GT_OQ), 8);
        for (int step = 4; step > 0; step /= 2) {
            const __m512i probe = _mm512_add_epi32(position, _mm512_set1_epi32(step - 1));
            const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(probe, all), _CMP_GT_OQ);
            position = _mm512_mask_add_epi32(position, above, position, _mm512_set1_epi32(step));
        }
        const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(position, 4), _mm512_srli_epi64(position, 32));
        _mm_storel_epi64((__m128i *)(packed + 8 * k), _mm512_cvtepi64_epi8(pairs));
    }
#else
    uint8_t codes[CHUNK];
    for (int i = 0; i < CHUNK; i++) codes[i] = 0;
    for (int k = 0; k < 15; k++)
        for (int i = 0; i < CHUNK; i++) codes[i] += x[i] * inverse > bounds[k];
    for (int i = 0; i < CHUNK / 2; i++) packed[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
#endif
}

static void quantize_units(Job *job) {
    const Quantize *q = job->data;
    for (int64_t unit, end; take(job, &unit, &end);) {
        const int64_t stop = end * UNIT < q->numel ? end * UNIT : q->numel;
        for (int64_t i = unit * UNIT; i < stop; i += q->block) {
            const float *x = q->values + i;
            const int64_t n = stop - i < q->block ? stop - i : q->block;
            const float most = largest(x, n), divisor = most > 1e-38f ? most : 1e-38f;
            if (n == q->block) {
                q->absmax[i / q->block] = most;
                for (int64_t j = 0; j < n; j += CHUNK)
                    quantize_chunk(x + j, 1.0f / divisor, q->bounds, q->packed + (i + j) / 2);
                continue;
            }
            /* bitsandbytes divides in the last, shorter block, and stores the bounded maximum. */
            q->absmax[i / q->block] = divisor;
            for (int64_t j = 0; j < n; j += 2) {
                const int first = code_of(x[j] / divisor, q->bounds);
                const int second = code_of(j + 1 < n ? x[j + 1] / divisor : 0, q->bounds);
                q->packed[(i + j) / 2] = (uint8_t)(first << 4 | second);
            }
        }
    }
}

/* Values (numel) -> packed (⌈numel / 2⌉), absmax (⌈numel / block⌉). */
int quantize_nf4(int64_t numel, int64_t block, const float *values, const float *bounds, uint8_t *packed,
                 float *absmax, int threads) {
    const Quantize quantize = {numel, block, values, bounds, packed, absmax};
    Job job = {(numel + UNIT - 1) / UNIT, 0, quantize_units, &quantize};
    return run(&job, threads);
}

/* ---- Decode ------------------------------------------------------------------------------------------------------ */

/* 16 entries from 8 bytes, in their order. */
static inline v16 decode16(const uint8_t *packed, const v16 *levels) {
#ifdef __AVX512F__
    int64_t eight;
    memcpy(&eight, packed, sizeof eight);
    /* Of an index the low four bits count: the high ones of byte k belong in lane 2k, the low ones in lane 2k + 1. */
#ifdef __AVX512VBMI__
    const __m512i shifts = _mm512_setr_epi64(0x0000000000000004, 0x000000080000000c, 0x0000001000000014,
                                             0x000000180000001c, 0x0000002000000024, 0x000000280000002c,
                                             0x0000003000000034, 0x000000380000003c);
    const __m512i codes = _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(eight));
#else
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(eight));
    const __m512i codes = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
#endif
    return (v16)_mm512_permutexvar_ps(codes, (__m512)*levels);
#else
    v16 found;
    for (int i = 0; i < 8; i++) {
        found[2 * i] = (*levels)[packed[i] >> 4];
        found[2 * i + 1] = (*levels)[packed[i] & 15];
    }
    return found;
#endif
}

static inline void store16(float *values, v16 found, int beyond_caches) {
#ifdef __AVX512F__
    if (beyond_caches) {
        _mm512_stream_ps(values, (__m512)found);
        return;
    }
#else
    (void)beyond_caches;
#endif
    *(v16 *)values = found;
}

typedef struct {
    int64_t numel, block;
    const uint8_t *packed;
    const float *absmax, *levels;
    float *values;
} Dequantize;

static void dequantize_units(Job *job) {
    const Dequantize *q = job->data;
    /* What will not be found in a cache again need not be read into one before it is written. */
    const int beyond_caches = q->numel >= BEYOND_CACHES && (uintptr_t)q->values % 64 == 0;
    for (int64_t unit, end; take(job, &unit, &end);) {
        const int64_t stop = end * UNIT < q->numel ? end * UNIT : q->numel;
        for (int64_t i = unit * UNIT; i < stop; i += q->block) {
            const int64_t n = stop - i < q->block ? stop - i : q->block;
            const float scale = q->absmax[i / q->block];
            const v16 levels = *(const v16 *)q->levels * scale;
            const uint8_t *packed = q->packed + i / 2;
            float *values = q->values + i;
            int64_t j = 0;
            for (; j + 16 <= n; j += 16) store16(values + j, decode16(packed + j / 2, &levels), beyond_caches);
            for (; j < n; j++) values[j] = scale * q->levels[j % 2 ? packed[j / 2] & 15 : packed[j / 2] >> 4];
        }
    }
#ifdef __AVX512F__
    _mm_sfence();
#endif
}

/* Packed codes -> values (numel). */
int dequantize_nf4(int64_t numel, int64_t block, const uint8_t *packed, const float *absmax, const float *levels,
                   float *values, int threads) {
    const Dequantize dequantize = {numel, block, packed, absmax, levels, values};
    Job job = {(numel + UNIT - 1) / UNIT, 0, dequantize_units, &dequantize};
    return run(&job, threads);
}

/* ---- Products ---------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t tokens, m, n, block;
    const float *x; /* (tokens, n), or (n, 8 or 16) for more than four */
    const uint8_t *packed;
    const float *absmax, *levels;
    float *y; /* (tokens, m) */
} Product;

/* One to four tokens: two rows are decoded in registers, 64 columns at a time, and multiplied by each token. An odd
   last row is its own partner. */
#define DEFINE_ROWS(T)                                                                             \
    static void rows_##T(Job *job) {                                                               \
        const Product *p = job->data;                                                              \
        const v16 levels = *(const v16 *)p->levels;                                                \
        const int64_t n = p->n;                                                                    \
        for (int64_t pair, end; take(job, &pair, &end);)                                           \
            for (; pair < end; pair++) {                                                           \
                const int64_t rows[2] = {2 * pair, 2 * pair + 1 < p->m ? 2 * pair + 1 : 2 * pair}; \
                v16 sums[T][2];                                                                    \
                memset(sums, 0, sizeof sums);                                                      \
                for (int64_t j = 0; j < n; j += CHUNK) {                                           \
                    v16 w[2][4];                                                                   \
                    float scale[2];                                                                \
                    for (int r = 0; r < 2; r++) {                                                  \
                        const int64_t at = rows[r] * n + j;                                        \
                        const uint8_t *packed = p->packed + at / 2;                                \
                        for (int k = 0; k < 4; k++) w[r][k] = decode16(packed + 8 * k, &levels);   \
                        scale[r] = p->absmax[at / p->block];                                       \
                    }                                                                              \
                    for (int t = 0; t < T; t++) {                                                  \
                        const v16 *x = (const v16 *)(p->x + t * n + j);                            \
                        for (int r = 0; r < 2; r++)                                                \
                            sums[t][r] += scale[r] * ((w[r][0] * x[0] + w[r][1] * x[1]) +          \
                                                      (w[r][2] * x[2] + w[r][3] * x[3]));          \
                    }                                                                              \
                }                                                                                  \
                for (int t = 0; t < T; t++)                                                        \
                    for (int r = 0; r < 2; r++) {                                                  \
                        float sum = 0;                                                             \
                        for (int k = 0; k < 16; k++) sum += sums[t][r][k];                         \
                        p->y[t * p->m + rows[r]] = sum;                                            \
                    }                                                                              \
            }                                                                                      \
    }
DEFINE_ROWS(1)
DEFINE_ROWS(2)
DEFINE_ROWS(3)
DEFINE_ROWS(4)

#ifdef __AVX512F__
#define GROUP 8 /* 32 vector registers */
#else
#define GROUP 4
#endif

/* Eight or sixteen tokens side by side in a register: GROUP rows are decoded into the cache, then walked down. */
#define DEFINE_COLUMNS(T)                                                                                 \
    static void columns_##T(Job *job) {                                                                   \
        const Product *p = job->data;                                                                     \
        const v16 levels = *(const v16 *)p->levels;                                                       \
        const int64_t n = p->n;                                                                           \
        float w[GROUP][CHUNK];                                                                            \
        for (int64_t group, end; take(job, &group, &end);)                                                \
            for (; group < end; group++) {                                                                \
                const int64_t low = group * GROUP, rows = p->m - low < GROUP ? p->m - low : GROUP;        \
                v##T sums[GROUP];                                                                         \
                memset(sums, 0, sizeof sums);                                                             \
                memset(w, 0, sizeof w);                                                                   \
                for (int64_t j = 0; j < n; j += CHUNK) {                                                  \
                    for (int r = 0; r < rows; r++) {                                                      \
                        const int64_t at = (low + r) * n + j;                                             \
                        const v16 scaled = levels * p->absmax[at / p->block];                             \
                        const uint8_t *packed = p->packed + at / 2;                                       \
                        for (int k = 0; k < 4; k++) ((v16 *)w[r])[k] = decode16(packed + 8 * k, &scaled); \
                    }                                                                                     \
                    for (int k = 0; k < CHUNK; k++) {                                                     \
                        const v##T x = *(const v##T *)(p->x + (j + k) * T);                               \
                        for (int r = 0; r < GROUP; r++) sums[r] += w[r][k] * x;                           \
                    }                                                                                     \
                }                                                                                         \
                for (int64_t t = 0; t < p->tokens; t++)                                                   \
                    for (int r = 0; r < rows; r++) p->y[t * p->m + low + r] = sums[r][t];                 \
            }                                                                                             \
    }
DEFINE_COLUMNS(8)
DEFINE_COLUMNS(16)

/* x (tokens, n), W (m, n) -> y (tokens, m); one to sixteen tokens, n a multiple of 64. Nonzero: not done. The bits of a
   token do not depend on `threads`. */
int product_nf4(int64_t tokens, int64_t m, int64_t n, int64_t block, const float *x, const uint8_t *packed,
                const float *absmax, const float *levels, float *y, int threads) {
    static void (*const by_rows[])(Job *) = {NULL, rows_1, rows_2, rows_3, rows_4};
    if (n % CHUNK || tokens < 1 || tokens > 16) return 1;
    Product product = {tokens, m, n, block, x, packed, absmax, levels, y};
    Job job = {(m + 1) / 2, 0, NULL, &product};
    if (tokens <= 4) {
        job.work = by_rows[tokens];
        return run(&job, threads);
    }
    float *turned = side_by_side(x, tokens, n, tokens <= 8 ? 8 : 16);
    if (turned == NULL) return 1;
    product.x = turned;
    job.rows = (m + GROUP - 1) / GROUP;
    job.work = tokens <= 8 ? columns_8 : columns_16;
    const int failed = run(&job, threads);
    free(turned);
    return failed;
}
