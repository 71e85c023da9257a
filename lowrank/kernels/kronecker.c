/* y[t] += vec(W1 X W2ᵀ) for tokens that have different factors W1, W2; X is x[t] as a matrix, W2 is full or W2a W2b. */

#include <stdint.h>
#include <stdlib.h>

#include "threads.h"

typedef struct {
    int64_t m, n, stride, most; /* stride: from a token's y to the next one's; most: numbers of the largest inner product */
    const float *x;
    float *y;
    const int64_t *sizes;                /* of every adapter: up, uq, vp, vq, r; r = 0 where W2 is full */
    const float *const *w1, *const *in; /* W1 (up, uq); W2bᵀ (vq, r), or W2ᵀ (vq, vp) */
    const float *const *out;             /* W2aᵀ (r, vp); unused where W2 is full */
    const int64_t *adapter, *token;      /* of every unit */
} Kronecker;

typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
#define LANES 8
/* Rows, and vectors of columns, of C that stay in registers. */
#define ROWS 4
#define VECTORS 2

/* A part of C (+)= A B of so many rows and vectors; both are constants where this is called. */
static inline __attribute__((always_inline)) void part(float *c, int64_t c_stride, const float *a, int64_t a_stride,
                                                       const float *b, int64_t b_stride, int64_t inner, int add,
                                                       const int rows, const int vectors) {
    Lanes sums[ROWS][VECTORS] = {{{0}}};
    for (int64_t j = 0; j < inner; j++)
        for (int v = 0; v < vectors; v++) {
            const Lanes row = *(const Lanes *)(b + j * b_stride + v * LANES);
            for (int r = 0; r < rows; r++) sums[r][v] += a[r * a_stride + j] * row;
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            Lanes *to = (Lanes *)(c + r * c_stride + v * LANES);
            if (add) sums[r][v] += *to;
            *to = sums[r][v];
        }
}

/* C (rows, wide) = A (rows, inner) B (inner, wide), or added to it; rows of A and C lie densely at their strides. */
static void product(float *c, int64_t c_stride, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                    int64_t rows, int64_t inner, int64_t wide, int add) {
    int64_t k = 0;
#define OVER_ROWS(vectors)                                                                                             \
    for (int64_t i = 0; i < rows;) {                                                                                   \
        float *to = c + i * c_stride + k;                                                                              \
        const float *from = a + i * a_stride;                                                                          \
        if (i + ROWS <= rows) {                                                                                        \
            part(to, c_stride, from, a_stride, b + k, b_stride, inner, add, ROWS, vectors);                            \
            i += ROWS;                                                                                                 \
        } else {                                                                                                       \
            part(to, c_stride, from, a_stride, b + k, b_stride, inner, add, 1, vectors);                               \
            i++;                                                                                                       \
        }                                                                                                              \
    }
    for (; k + VECTORS * LANES <= wide; k += VECTORS * LANES) OVER_ROWS(VECTORS)
    for (; k + LANES <= wide; k += LANES) OVER_ROWS(1)
#undef OVER_ROWS
    for (int64_t i = 0; i < rows; i++)
        for (int64_t o = k; o < wide; o++) {
            float sum = add ? c[i * c_stride + o] : 0;
            for (int64_t j = 0; j < inner; j++) sum += a[i * a_stride + j] * b[j * b_stride + o];
            c[i * c_stride + o] = sum;
        }
}

static void add_token(const Kronecker *g, int64_t unit, float *inner, float *mixed) {
    const int64_t own = g->adapter[unit], *size = g->sizes + 5 * own;
    const int64_t up = size[0], uq = size[1], vp = size[2], vq = size[3], rank = size[4], wide = rank > 0 ? rank : vp;
    const float *x = g->x + g->token[unit] * g->n, *w1 = g->w1[own];
    float *y = g->y + g->token[unit] * g->stride;
    product(inner, wide, x, vq, g->in[own], wide, uq, vq, wide, 0);
    if (rank == 0) {
        product(y, vp, w1, uq, inner, wide, up, uq, wide, 1);
        return;
    }
    product(mixed, wide, w1, uq, inner, wide, up, uq, wide, 0);
    product(y, vp, mixed, wide, g->out[own], vp, up, rank, vp, 1);
}

static void add_tokens(Job *job) {
    const Kronecker *g = job->data;
    float *inner = malloc((size_t)(2 * g->most) * sizeof(float));
    if (inner == NULL) return;
    for (int64_t unit, end; take(job, &unit, &end);)
        for (; unit < end; unit++) add_token(g, unit, inner, inner + g->most);
    free(inner);
}

/* Nonzero: not done for want of memory, perhaps in part. */
int add_kronecker(int64_t units, int64_t m, int64_t n, int64_t stride, int64_t most, const float *x, float *y,
                  const int64_t *sizes, const float *const *w1, const float *const *in, const float *const *out,
                  const int64_t *adapter, const int64_t *token, int threads) {
    const Kronecker grouped = {m, n, stride, most, x, y, sizes, w1, in, out, adapter, token};
    Job job = {units, 0, add_tokens, &grouped};
    return run(&job, threads);
}
