/* y[t] += Bᵀ(A x[t]) for tokens that have different pairs A, B: every pair is read once, where it lies. Layers of one
   input go together: each owner of tokens has a pair for every one of them, which changes columns of its own. */

#include <stdint.h>

#include "threads.h"

/* Tokens of one owner that share a pass over its pairs. */
#define TOKENS 4
/* Ranks, and outputs, that are worked on while they are in the first cache. */
#define RANKS 64
#define OUTPUTS 512
/* Ranks that are added in one go. */
#define TOGETHER 8
/* Numbers of a cache line. */
#define LINE 16

typedef struct {
    int64_t rank, column, width; /* rank 0: no pair; the first of its columns of y, and how many (m) */
    const float *a, *b;          /* A (r, n) and Bᵀ (r, m) */
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
        const float *a = pair->a + low * g->n, *b = pair->b + low * m;
        for (int64_t k = 0; k < ranks; k++) {
            fetch(b + k * m, m);
            dot(a + k * g->n, x, g->n, count, sums);
            for (int64_t t = 0; t < count; t++) h[t][k] = sums[t];
        }
        if (next != pair && low + RANKS >= pair->rank) fetch(next->a, next->rank * g->n);
        for (int64_t i = 0; i < m; i += OUTPUTS)
            for (int64_t t = 0; t < count; t++)
                add_rows(g->y + tokens[t] * g->stride + pair->column + i, b + i, m, h[t], ranks,
                         m - i < OUTPUTS ? m - i : OUTPUTS);
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
