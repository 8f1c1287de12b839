// The tokens that llm.c trains on, read as its llmc/dataloader.h reads them (Karpathy, llm.c, MIT
// license) on one GPU without shuffling: the same glob, checks and order, one epoch long.
//
//     llm_c_dataloader PATTERN B T
//
// prints the number of tokens, then a line for each batch: B * T inputs and the last target.
#include <assert.h>
#include <glob.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define HEADER_SIZE 256

static FILE *open_shard(const char *filename, int64_t *ntok) {
    FILE *file = fopen(filename, "rb");
    int header[HEADER_SIZE];
    assert(file && fread(header, sizeof(int), HEADER_SIZE, file) == HEADER_SIZE);
    if (header[0] != 20240520) { printf("Bad magic in the data file\n"); exit(EXIT_FAILURE); }
    if (header[1] != 1) { printf("Bad version in data file\n"); exit(EXIT_FAILURE); }
    *ntok = header[2];
    assert(*ntok > 0);
    fseek(file, 0, SEEK_END);
    int64_t expected_file_size = HEADER_SIZE * sizeof(int) + *ntok * sizeof(uint16_t);
    if (ftell(file) != expected_file_size) {
        printf("Error: file size is not as expected\n");
        exit(EXIT_FAILURE);
    }
    return file;
}

int main(int argc, char **argv) {
    assert(argc == 4);
    size_t batch = atoi(argv[2]) * atoi(argv[3]);
    glob_t shards;
    if (glob(argv[1], 0, NULL, &shards) != 0) {
        printf("Error: failed to glob pattern: %s\n", argv[1]);
        exit(EXIT_FAILURE);
    }
    int64_t ntok, ntok_total = 0;
    for (size_t i = 0; i < shards.gl_pathc; i++) {
        fclose(open_shard(shards.gl_pathv[i], &ntok));
        assert(ntok >= (int64_t)(batch + 1));
        ntok_total += ntok;
    }
    printf("%lld\n", (long long)ntok_total);
    uint16_t *buffer = malloc((batch + 1) * sizeof(uint16_t));
    for (size_t i = 0; i < shards.gl_pathc; i++) {
        FILE *file = open_shard(shards.gl_pathv[i], &ntok);
        for (size_t b = 0; b < (ntok - 1) / batch; b++) {
            fseek(file, HEADER_SIZE * sizeof(int) + b * batch * sizeof(uint16_t), SEEK_SET);
            assert(fread(buffer, sizeof(uint16_t), batch + 1, file) == batch + 1);
            for (size_t t = 0; t <= batch; t++) printf("%d ", buffer[t]);
            printf("\n");
        }
        fclose(file);
    }
    free(buffer);
    globfree(&shards);
    return 0;
}
