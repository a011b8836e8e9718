/* The floor of restoring a VM: from open("/dev/kvm"), or from a VM made ahead, to the first exit. Freeing is not timed.
 *
 *     floor_restore RECIPE MIB
 *
 * RECIPE is what restore_recipe.py wrote of a snapshot. For each line on stdin one sample, its nanoseconds on stdout:
 *
 *     go      a VM from nothing            shell   a VM made ahead is given memory and state
 *     keep    as go, and the VM lives on   free    all that live on end (the sample is of that)
 *     fresh   COUNT pages that nobody touched are written, of a VM that came to its first exit
 *     copy    COUNT pages that were read are written
 *
 * Built as a shared object it is a library with floor_prepare and floor_sample, for a floor in the same address space, and
 * floor_sample_handed, where another thread is woken for it, as one must be if the caller has other things to do.
 */
#pragma GCC diagnostic ignored "-Wunused-function"
#include "floor_vm.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>

#define COUNT 256
#define PAGE 4096
#define TOUCHED (32ul << 20) /* amid what the guest has filled */
#define MOST 512

struct header {
    uint32_t pieces, calls;
    uint64_t state_size, tsc_offset;
    char memory_file[512];
};

struct piece {
    uint64_t offset, size;
    int64_t from; /* in the memory file; -1 for zeros */
};

enum kind { VALUE, STATE, TSC_OFFSET };

struct setting {
    uint32_t to_vm, may_fail, kind, unused;
    uint64_t request, value;
};

static struct header header;
static struct piece *pieces;
static struct setting *settings;
static char *state;
static int memory_fd;
static struct vm kept[MOST];
static int kept_count;

static void read_restore_recipe(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        die(path);
    take(file, &header, sizeof header);
    pieces = calloc(header.pieces, sizeof *pieces);
    settings = calloc(header.calls, sizeof *settings);
    state = malloc(header.state_size);
    take(file, pieces, header.pieces * sizeof *pieces);
    take(file, settings, header.calls * sizeof *settings);
    take(file, state, header.state_size);
    fclose(file);
    memory_fd = open(header.memory_file, O_RDONLY | O_CLOEXEC);
    if (memory_fd < 0)
        die(header.memory_file);
}

static void reserve(struct vm *vm)
{
    vm->memory = mmap(0, memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (vm->memory == MAP_FAILED)
        die("mmap");
    madvise(vm->memory, memory_size, MADV_DONTFORK);
}

static void map_saved(struct vm *vm)
{
    for (uint32_t i = 0; i < header.pieces; i++) {
        struct piece *piece = &pieces[i];
        int zeros = piece->from < 0, flags = MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED | (zeros ? MAP_ANONYMOUS : 0);
        char *place = vm->memory + piece->offset;
        if (mmap(place, piece->size, PROT_READ | PROT_WRITE, flags, zeros ? -1 : memory_fd, zeros ? 0 : piece->from) ==
            MAP_FAILED)
            die("mmap of saved memory");
        madvise(place, piece->size, MADV_DONTFORK);
    }
}

static void register_memory(struct vm *vm)
{
    struct kvm_userspace_memory_region slot = {0, 0, 0, memory_size, (uintptr_t)vm->memory};
    CALL(vm->vm, KVM_SET_USER_MEMORY_REGION, &slot);
}

static void set_state(struct vm *vm)
{
    struct kvm_device_attr offset = {
        .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)&header.tsc_offset};
    for (uint32_t i = 0; i < header.calls; i++) {
        struct setting *setting = &settings[i];
        void *argument = setting->kind == VALUE   ? (void *)(uintptr_t)setting->value
                         : setting->kind == STATE ? state + setting->value
                                                  : (void *)&offset;
        if (ioctl(setting->to_vm ? vm->vm : vm->vcpu, setting->request, argument) < 0 && !setting->may_fail)
            die("a saved state");
    }
}

static void make_shell(struct vm *vm, int with_memory)
{
    open_system(vm);
    create(vm);
    reserve(vm);
    if (with_memory)
        map_saved(vm);
    register_memory(vm);
    create_interrupt_controllers(vm);
    create_vcpu(vm);
}

static void enter(struct vm *vm)
{
    CALL(vm->vcpu, KVM_RUN, 0);
    if (vm->run->exit_reason != KVM_EXIT_IO)
        die("not the guest's IN");
}

static uint64_t restore_since(uint64_t begin, struct vm *vm)
{
    make_shell(vm, 1);
    set_state(vm);
    enter(vm);
    return now() - begin;
}

static uint64_t restore(struct vm *vm)
{
    return restore_since(now(), vm);
}

static uint64_t since(uint64_t begin)
{
    struct vm vm;
    uint64_t took = restore_since(begin, &vm);
    destroy(&vm);
    return took;
}

static uint64_t from_nothing(void)
{
    return since(now());
}

static uint64_t from_shell(void)
{
    struct vm vm;
    make_shell(&vm, 0);
    uint64_t begin = now();
    map_saved(&vm);
    set_state(&vm);
    enter(&vm);
    uint64_t took = now() - begin;
    destroy(&vm);
    return took;
}

static uint64_t keep(void)
{
    if (kept_count == MOST)
        die("too many VMs");
    uint64_t took = restore(&kept[kept_count]);
    kept_count++;
    return took;
}

static uint64_t free_kept(void)
{
    uint64_t begin = now();
    while (kept_count)
        destroy(&kept[--kept_count]);
    return now() - begin;
}

static uint64_t write_pages(int read_first)
{
    struct vm vm;
    restore(&vm);
    volatile char *at = vm.memory + TOUCHED;
    for (int i = 0; read_first && i < COUNT; i++)
        (void)at[i * PAGE];
    uint64_t begin = now();
    for (int i = 0; i < COUNT; i++)
        at[i * PAGE] = 1;
    uint64_t took = now() - begin;
    destroy(&vm);
    return took;
}

static uint64_t write_fresh(void)
{
    return write_pages(0);
}

static uint64_t write_read(void)
{
    return write_pages(1);
}

static const struct {
    const char *name;
    uint64_t (*take)(void);
} samples[] = {
    {"go", from_nothing}, {"shell", from_shell},   {"keep", keep},
    {"free", free_kept},  {"fresh", write_fresh}, {"copy", write_read},
};

static uint64_t answer(const char *name)
{
    for (size_t i = 0; i < sizeof samples / sizeof *samples; i++)
        if (!strcmp(name, samples[i].name))
            return samples[i].take();
    die("no such sample");
    return 0;
}

int main(int count, char **words)
{
    char line[64];
    if (count != 3)
        die("usage: floor_restore RECIPE MIB");
    memory_size = strtoul(words[2], 0, 10) << 20;
    read_restore_recipe(words[1]);
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        printf("%llu\n", (unsigned long long)answer(line));
        fflush(stdout);
    }
    return 0;
}

/* Take the recipe; 0 if that failed. */
int floor_prepare(const char *path, const char *mib)
{
    jmp_buf here;
    caller = &here;
    if (setjmp(here))
        return 0;
    memory_size = strtoul(mib, 0, 10) << 20;
    read_restore_recipe(path);
    return 1;
}

static uint64_t sample_since(uint64_t begin)
{
    jmp_buf here;
    caller = &here;
    return setjmp(here) ? 0 : since(begin);
}

/* Nanoseconds of one sample; 0 if it failed. */
uint64_t floor_sample(void)
{
    return sample_since(now());
}

static uint32_t asked, answered; /* futexes */
static uint64_t asked_ns, answer_ns;

static void wait_for(uint32_t *word)
{
    while (!__atomic_load_n(word, __ATOMIC_ACQUIRE))
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, 0, 0);
    *word = 0;
}

static void tell(uint32_t *word)
{
    __atomic_store_n(word, 1, __ATOMIC_RELEASE);
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1);
}

static void *answer_for_good(void *unused)
{
    for (;;) {
        wait_for(&asked);
        answer_ns = sample_since(asked_ns);
        tell(&answered);
    }
    return unused;
}

/* As floor_sample, by another thread. */
uint64_t floor_sample_handed(void)
{
    static pthread_t other;
    if (!other && pthread_create(&other, 0, answer_for_good, 0))
        return 0;
    asked_ns = now();
    tell(&asked);
    wait_for(&answered);
    return answer_ns;
}
