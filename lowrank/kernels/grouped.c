/* y[t] += s B(A x[t]) for tokens that have different pairs A, B: every pair is read once, where it lies. Layers of one
   input go together: each owner of tokens has a pair for every one of them, which changes columns of its own. */

#include <stdint.h>

#include "threads.h"

/* Tokens of one owner that share a pass over its pairs. */
#define TOKENS 4
/* Ranks, and outputs or numbers of B, that are worked on while they are in the first cache. */
#define RANKS 64
#define OUTPUTS 512
#define NUMBERS 4096
/* Ranks that are added in one go. */
#define TOGETHER 8
/* Numbers of a cache line. */
#define LINE 16

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(32)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

typedef struct {
    int64_t rank, column, width; /* rank 0: no pair; the first of its columns of y, and how many (m) */
    const float *a, *b;          /* A (r, n), and B (m, r) or Bᵀ (r, m) */
    int64_t by_outputs;          /* whether it is B; then r is a multiple of TOGETHER */
    double scale;                /* s */
} Pair;

typedef struct {
    int64_t layers, units, n, stride; /* units of tokens; stride: from a token's y to the next one's */
    const float *x;
    float *y;
    const Pair *pairs;             /* of every owner, one per layer */
    const int64_t *owner, *first;  /* of every unit: its owner, and where its tokens begin; one more at the end */
    const int64_t *tokens;         /* of all units, one after another */
} Grouped;

/* Memory is far: what is worked on next is asked for while what came before is worked on. */
static void fetch(const float *data, int64_t count) {
    for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(data + i, 0, 2);
}

static void dot(const float *restrict row, const float *const x[TOKENS], int64_t n, int64_t count, float *sums) {
    if (count == TOKENS) {
        const float *restrict a = x[0], *restrict b = x[1], *restrict c = x[2], *restrict d = x[3];
        float first = 0, second = 0, third = 0, fourth = 0;
        for (int64_t j = 0; j < n; j++) {
            first += row[j] * a[j];
            second += row[j] * b[j];
            third += row[j] * c[j];
            fourth += row[j] * d[j];
        }
        sums[0] = first, sums[1] = second, sums[2] = third, sums[3] = fourth;
        return;
    }
    for (int64_t t = 0; t < count; t++) {
        const float *restrict own = x[t];
        float sum = 0;
        for (int64_t j = 0; j < n; j++) sum += row[j] * own[j];
        sums[t] = sum;
    }
}

/* y += hᵀ B for some ranks, over some columns. */
static void add_rows(float *restrict y, const float *restrict b, int64_t stride, const float *h, int64_t ranks,
                     int64_t wide) {
    int64_t k = 0;
    for (; k + TOGETHER <= ranks; k += TOGETHER) {
        const float *restrict row = b + k * stride, *own = h + k;
        for (int64_t j = 0; j < wide; j++) {
            float sum = 0;
            for (int64_t i = 0; i < TOGETHER; i++) sum += own[i] * row[i * stride + j];
            y[j] += sum;
        }
    }
    for (; k < ranks; k++)
        for (int64_t j = 0; j < wide; j++) y[j] += h[k] * b[k * stride + j];
}

/* Eight rows' sums, in their order. */
static inline v8 sums_of(const v8 rows[8]) {
    v8 twos[4], fours[2];
    for (int i = 0; i < 4; i++)
        twos[i] = SHUFFLE(rows[2 * i], rows[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
                  SHUFFLE(rows[2 * i], rows[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    for (int i = 0; i < 2; i++)
        fours[i] = SHUFFLE(twos[2 * i], twos[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                   SHUFFLE(twos[2 * i], twos[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

/* The same of B as it is: y += B h, `stride` numbers from an output to the next one. */
static void add_outputs(float *restrict y, const float *restrict b, int64_t stride, const float *h, int64_t ranks,
                        int64_t wide) {
    int64_t i = 0;
    for (; i + 8 <= wide; i += 8) {
        v8 rows[8];
        for (int r = 0; r < 8; r++) rows[r] = *(const v8 *)(b + (i + r) * stride) * *(const v8 *)h;
        for (int64_t k = 8; k < ranks; k += 8)
            for (int r = 0; r < 8; r++) rows[r] += *(const v8 *)(b + (i + r) * stride + k) * *(const v8 *)(h + k);
        *(v8 *)(y + i) += sums_of(rows);
    }
    for (; i < wide; i++)
        for (int64_t k = 0; k < ranks; k++) y[i] += b[i * stride + k] * h[k];
}

static const Pair *pair_of(const Grouped *g, int64_t place) {
    return g->pairs + g->owner[place % g->units] * g->layers + place / g->units;
}

static void add_unit(const Grouped *g, int64_t place, int64_t end) {
    const Pair *pair = pair_of(g, place), *next = place + 1 < end ? pair_of(g, place + 1) : pair;
    const int64_t unit = place % g->units, count = g->first[unit + 1] - g->first[unit], m = pair->width;
    const int64_t *tokens = g->tokens + g->first[unit];
    const float *x[TOKENS];
    float h[TOKENS][RANKS], sums[TOKENS];
    for (int64_t t = 0; t < count; t++) x[t] = g->x + tokens[t] * g->n;
    for (int64_t low = 0; low < pair->rank; low += RANKS) {
        const int64_t ranks = pair->rank - low < RANKS ? pair->rank - low : RANKS;
        const float *a = pair->a + low * g->n, scale = (float)pair->scale;
        for (int64_t k = 0; k < ranks; k++) {
            fetch(pair->b + (low + k) * m, m);
            dot(a + k * g->n, x, g->n, count, sums);
            for (int64_t t = 0; t < count; t++) h[t][k] = sums[t] * scale;
        }
        if (next != pair && low + RANKS >= pair->rank) fetch(next->a, next->rank * g->n);
        const int64_t step = pair->by_outputs ? NUMBERS / ranks & -8 : OUTPUTS;
        for (int64_t i = 0; i < m; i += step) {
            const int64_t wide = m - i < step ? m - i : step;
            for (int64_t t = 0; t < count; t++) {
                float *y = g->y + tokens[t] * g->stride + pair->column + i;
                if (pair->by_outputs) add_outputs(y, pair->b + i * pair->rank + low, pair->rank, h[t], ranks, wide);
                else add_rows(y, pair->b + low * m + i, m, h[t], ranks, wide);
            }
        }
    }
}

static void add_units(Job *job) {
    for (int64_t place, end; take(job, &place, &end);)
        for (; place < end; place++) add_unit(job->data, place, end);
}

int add_grouped(int64_t layers, int64_t units, int64_t n, int64_t stride, const float *x, float *y, const Pair *pairs,
                const int64_t *owner, const int64_t *first, const int64_t *tokens, int threads) {
    const Grouped grouped = {layers, units, n, stride, x, y, pairs, owner, first, tokens};
    Job job = {layers * units, 0, add_units, &grouped};
    return run(&job, threads);
}
