/* Rows of independent work on a few threads. They wait asleep and none outlives its call, so that neither a busy machine
   nor fork() hurts; since rows are independent, results do not depend on how many there are. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

/* Damping rises tenfold until a factorisation exists; beyond this many times the numbers were not finite. */
#define ATTEMPTS 12

#define GRAIN 8
#define MOST_THREADS 256

/* Rows 0..rows-1, handed out GRAIN at a time; `work` takes them until none is left. */
typedef struct Job {
    int64_t rows;
    _Atomic int64_t next;
    void (*work)(struct Job *);
    const void *data;
} Job;

static int take(Job *job, int64_t *low, int64_t *high) {
    if (atomic_load(&job->next) >= job->rows) return 0;
    *low = atomic_fetch_add(&job->next, GRAIN);
    *high = *low + GRAIN < job->rows ? *low + GRAIN : job->rows;
    return *low < job->rows;
}

static void *enter(void *job) {
    ((Job *)job)->work(job);
    return NULL;
}

/* Nonzero when rows are left because no thread had memory for its work. */
static int run(Job *job, int threads) {
    pthread_t ids[MOST_THREADS];
    int started = 0;
    const int64_t useful = (job->rows + GRAIN - 1) / GRAIN;
    while (started + 1 < threads && started + 1 < useful && started < MOST_THREADS &&
           pthread_create(ids + started, NULL, enter, job) == 0)
        started++;
    job->work(job);
    while (started > 0) pthread_join(ids[--started], NULL);
    return atomic_load(&job->next) < job->rows;
}
