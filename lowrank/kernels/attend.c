/* What stands between the products of a Llama layer in a pass over tokens of several requests, each with its own past:
   rotary embedding, keys and values into the cache, attention over it, and the two small functions of rows. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "threads.h"

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));

typedef int32_t i16 __attribute__((vector_size(64)));

/* Heads that share a key and are worked on together. */
#define SHARED 4
/* Registers of a value that are summed at a time. */
#define VECTORS 4

typedef struct {
    int64_t tokens, heads, kv_heads, size, window; /* window: how many tokens are seen, 0 for all */
    float scale;
    int64_t stride;                     /* from a token's q, k, v to the next one's */
    float *qkv;                         /* (tokens, stride): q (heads, size), k and v (kv_heads, size) */
    const float *cosine, *sine;         /* (tokens, size) */
    float *keys, *values;               /* (rows, kv_heads, size, columns), (rows, kv_heads, columns, size) */
    int64_t columns;                    /* a multiple of 16 */
    const int64_t *rows, *positions;    /* of every token: its request's row, and its column */
    float *said;                        /* (tokens, heads, size) */
} Pass;

static void turn(float *head, const float *cosine, const float *sine, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t d = 0; d < half; d++) {
        const float first = head[d], second = head[d + half];
        head[d] = first * cosine[d] - second * sine[d];
        head[d + half] = second * cosine[d + half] + first * sine[d + half];
    }
}

/* Turn q and k by the token's position, and put k and v into the cache. */
static void keep(Job *job) {
    const Pass *p = job->data;
    for (int64_t t, end; take(job, &t, &end);)
        for (; t < end; t++) {
            const float *cosine = p->cosine + t * p->size, *sine = p->sine + t * p->size;
            float *heads = p->qkv + t * p->stride;
            for (int64_t h = 0; h < p->heads + p->kv_heads; h++) turn(heads + h * p->size, cosine, sine, p->size);
            const float *key = heads + p->heads * p->size, *value = key + p->kv_heads * p->size;
            for (int64_t h = 0; h < p->kv_heads; h++) {
                const int64_t head = (p->rows[t] * p->kv_heads + h) * p->columns * p->size;
                float *to = p->keys + head + p->positions[t], *all = p->values + head + p->positions[t] * p->size;
                for (int64_t d = 0; d < p->size; d++) to[d * p->columns] = key[h * p->size + d];
                for (int64_t d = 0; d < p->size; d++) all[d] = value[h * p->size + d];
            }
        }
}

/* scores[g][j - first] = q[g]·k[j] for whole registers of columns from `first`. */
static inline __attribute__((always_inline)) void score(int count, int64_t size, int64_t columns, int64_t wide,
                                                        const float *query, const float *keys, float *scores) {
    for (int64_t j = 0; j < wide; j += 16) {
        v16 sums[SHARED];
        for (int g = 0; g < count; g++) sums[g] = (v16){0};
        for (int64_t d = 0; d < size; d++) {
            const v16 key = *(const v16 *)(keys + d * columns + j);
            for (int g = 0; g < count; g++) sums[g] += query[g * size + d] * key;
        }
        for (int g = 0; g < count; g++) *(v16 *)(scores + g * wide + j) = sums[g];
    }
}

/* exp(x) for x <= 0, to a few units in the last place: 2^n times the series of what is left, |rest| <= ln 2 / 2. */
static inline __attribute__((always_inline)) v16 exponential(v16 x) {
    const i16 low = x < -87.0f, least = (i16)((v16){0} - 87.0f);
    x = (v16)((low & least) | (~low & (i16)x));
    const i16 n = __builtin_convertvector(x * 1.44269504f - 0.5f, i16);
    const v16 rest = x - __builtin_convertvector(n, v16) * 0.693147181f;
    v16 sum = (v16){0} + 1.0f / 720;
    sum = sum * rest + 1.0f / 120;
    sum = sum * rest + 1.0f / 24;
    sum = sum * rest + 1.0f / 6;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    return (v16)((i16)sum + (n << 23));
}

/* said[g] = Σ_j share[g][j] v[j] over `vectors` registers of a value. */
static inline __attribute__((always_inline)) void gather(int count, int vectors, int64_t size, int64_t wide, int64_t seen,
                                                         const float *scores, const float *values, float *said) {
    v16 sums[SHARED][VECTORS];
    for (int g = 0; g < count; g++)
        for (int v = 0; v < vectors; v++) sums[g][v] = (v16){0};
    for (int64_t j = 0; j < seen; j++)
        for (int v = 0; v < vectors; v++) {
            const v16 value = *(const v16 *)(values + j * size + 16 * v);
            for (int g = 0; g < count; g++) sums[g][v] += scores[g * wide + j] * value;
        }
    for (int g = 0; g < count; g++)
        for (int v = 0; v < vectors; v++) *(v16 *)(said + g * size + 16 * v) = sums[g][v];
}

static void gather_any(int count, int64_t size, int64_t low, int64_t wide, int64_t seen, const float *scores,
                       const float *values, float *said) {
    for (int g = 0; g < count; g++)
        for (int64_t d = low; d < size; d++) {
            float sum = 0;
            for (int64_t j = 0; j < seen; j++) sum += scores[g * wide + j] * values[j * size + d];
            said[g * size + d] = sum;
        }
}

/* One token's heads that share a key: softmax(scale q Kᵀ) V over the columns that it sees. */
static inline __attribute__((always_inline)) void attend_heads(const Pass *p, int64_t t, int64_t kv, int64_t low,
                                                               int count, float *scores) {
    const int64_t size = p->size, shared = p->heads / p->kv_heads, last = p->positions[t];
    const int64_t first = p->window > 0 && last + 1 > p->window ? last + 1 - p->window : 0;
    /* Whole registers from a whole register: what lies before the window or after the token is left out again. */
    const int64_t from = first - first % 16, skipped = first - from, seen = last + 1 - from, wide = (seen + 15) / 16 * 16;
    const int64_t head = (p->rows[t] * p->kv_heads + kv) * p->columns * size;
    const float *query = p->qkv + t * p->stride + (kv * shared + low) * size, *values = p->values + head + from * size;
    float *said = p->said + (t * p->heads + kv * shared + low) * size;
    score(count, size, p->columns, wide, query, p->keys + head + from, scores);
    for (int g = 0; g < count; g++) {
        float *own = scores + g * wide, most = own[skipped], sum = 0;
        for (int64_t j = skipped; j < seen; j++) most = own[j] > most ? own[j] : most;
        for (int64_t j = 0; j < wide; j += 16) {
            v16 *part = (v16 *)(own + j);
            *part = exponential(p->scale * (*part - most));
        }
        for (int64_t j = 0; j < skipped; j++) own[j] = 0;
        for (int64_t j = skipped; j < seen; j++) sum += own[j];
        for (int64_t j = skipped; j < seen; j++) own[j] /= sum;
    }
    const int64_t whole = size - size % (16 * VECTORS);
    int64_t d = 0;
    for (; d < whole; d += 16 * VECTORS) gather(count, VECTORS, size, wide, seen, scores, values + d, said + d);
    for (; d + 16 <= size; d += 16) gather(count, 1, size, wide, seen, scores, values + d, said + d);
    gather_any(count, size, d, wide, seen, scores, values, said);
}

static void attend_some(const Pass *p, int64_t t, int64_t kv, int64_t low, int64_t count, float *scores) {
    switch (count) {
    case 1: attend_heads(p, t, kv, low, 1, scores); break;
    case 2: attend_heads(p, t, kv, low, 2, scores); break;
    case 3: attend_heads(p, t, kv, low, 3, scores); break;
    default: attend_heads(p, t, kv, low, SHARED, scores);
    }
}

static void attend(Job *job) {
    const Pass *p = job->data;
    const int64_t shared = p->heads / p->kv_heads;
    int64_t most = 0;
    for (int64_t t = 0; t < p->tokens; t++) most = p->positions[t] > most ? p->positions[t] : most;
    float *scores = malloc((size_t)(most + 32) * SHARED * sizeof(float));
    if (scores == NULL) return;
    for (int64_t unit, end; take(job, &unit, &end);)
        for (; unit < end; unit++)
            for (int64_t low = 0; low < shared; low += SHARED)
                attend_some(p, unit / p->kv_heads, unit % p->kv_heads, low,
                            shared - low < SHARED ? shared - low : SHARED, scores);
    free(scores);
}

/* The first half of a pass: `qkv` is turned in place, and its keys and values are put into the cache. */
int keep_tokens(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, int64_t stride, float *qkv,
                const float *cosine, const float *sine, float *keys, float *values, int64_t columns,
                const int64_t *rows, const int64_t *positions, int threads) {
    const Pass pass = {.tokens = tokens, .heads = heads, .kv_heads = kv_heads, .size = size, .stride = stride,
                       .qkv = qkv, .cosine = cosine, .sine = sine, .keys = keys, .values = values,
                       .columns = columns, .rows = rows, .positions = positions};
    Job job = {tokens, 0, keep, &pass};
    return run(&job, threads);
}

/* The second half: what the heads of tokens say whose queries are turned. Nonzero: not done for want of memory. */
int attend_tokens(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, int64_t window, float scale,
                  int64_t stride, float *qkv, float *keys, float *values, int64_t columns, const int64_t *rows, const int64_t *positions, float *said, int threads) {
    const Pass pass = {.tokens = tokens, .heads = heads, .kv_heads = kv_heads, .size = size, .window = window,
                       .scale = scale, .stride = stride, .qkv = qkv, .keys = keys, .values = values,
                       .columns = columns, .rows = rows, .positions = positions,
                       .said = said};
    Job job = {tokens * kv_heads, 0, attend, &pass};
    return run(&job, threads);
}

/* y = weight · x / sqrt(mean(x²) + eps) for rows of n. */
void normalize_rows(int64_t rows, int64_t n, const float *x, const float *weight, float eps, float *y) {
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * n;
        float *restrict to = y + r * n, sum = 0;
        for (int64_t j = 0; j < n; j++) sum += from[j] * from[j];
        const float factor = 1 / sqrtf(sum / (float)n + eps);
        for (int64_t j = 0; j < n; j++) to[j] = weight[j] * (from[j] * factor);
    }
}
