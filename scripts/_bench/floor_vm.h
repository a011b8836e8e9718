/* What the floors share: a VM made by the system calls that asyncvmm makes, in the same order, from a recipe.
 *
 * The recipe file is what Python decided: see recipe.py. What asyncvmm does once a process (asking for the supported
 * CPUID and making it the guest's) is not done again for each VM here either.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct recipe {
    uint32_t segments, msrs, cpuid_entries, unused;
    struct kvm_sregs sregs;
    struct kvm_regs regs;
};

struct segment {
    uint64_t address, size;
};

static struct {
    struct kvm_msrs head;
    struct kvm_msr_entry entries[64];
} msrs;

static struct {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[256];
} cpuid;

static struct recipe recipe;
static struct segment *segments;
static char **contents;
static size_t memory_size;
static int irqchip_first; /* as most VMMs do it; asyncvmm does not, see vm.py */

struct vm {
    int kvm, vm, vcpu, run_size;
    char *memory;
    struct kvm_run *run;
};

static jmp_buf *caller; /* of a floor loaded into another process, which must not end with it */

static void die(const char *what)
{
    perror(what);
    if (caller)
        longjmp(*caller, 1);
    printf("%s\n", what);
    exit(1);
}

static int call(int fd, unsigned long request, void *argument, const char *what)
{
    int result = ioctl(fd, request, argument);
    if (result < 0)
        die(what);
    return result;
}
#define CALL(fd, request, argument) call(fd, request, (void *)(uintptr_t)(argument), #request)

static void take(FILE *file, void *into, size_t size)
{
    if (fread(into, 1, size, file) != size)
        die("recipe");
}

static void read_recipe(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        die(path);
    take(file, &recipe, sizeof recipe);
    msrs.head.nmsrs = recipe.msrs;
    take(file, msrs.entries, recipe.msrs * sizeof msrs.entries[0]);
    cpuid.head.nent = recipe.cpuid_entries;
    take(file, cpuid.entries, recipe.cpuid_entries * sizeof cpuid.entries[0]);
    segments = calloc(recipe.segments, sizeof *segments);
    contents = calloc(recipe.segments, sizeof *contents);
    for (uint32_t i = 0; i < recipe.segments; i++) {
        take(file, &segments[i], sizeof segments[i]);
        contents[i] = malloc(segments[i].size);
        take(file, contents[i], segments[i].size);
    }
    fclose(file);
}

static void open_system(struct vm *vm)
{
    vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (vm->kvm < 0)
        die("/dev/kvm");
    CALL(vm->kvm, KVM_GET_API_VERSION, 0);
    CALL(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_IRQCHIP);
    CALL(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY);
    CALL(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT);
    vm->run_size = CALL(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    CALL(vm->kvm, KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS);
}

static void create(struct vm *vm)
{
    uint64_t identity_map = 0xfffbc000;
    vm->vm = CALL(vm->kvm, KVM_CREATE_VM, 0);
    CALL(vm->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
    CALL(vm->vm, KVM_SET_TSS_ADDR, 0xfffbd000);
}

static void create_interrupt_controllers(struct vm *vm)
{
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    CALL(vm->vm, KVM_CREATE_IRQCHIP, 0);
    CALL(vm->vm, KVM_CREATE_PIT2, &pit);
}

static void create_memory(struct vm *vm)
{
    vm->memory = mmap(0, memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (vm->memory == MAP_FAILED)
        die("mmap");
    madvise(vm->memory, memory_size, MADV_DONTFORK);
    struct kvm_userspace_memory_region slot = {0, 0, 0, memory_size, (uintptr_t)vm->memory};
    CALL(vm->vm, KVM_SET_USER_MEMORY_REGION, &slot);
}

static void create_vcpu(struct vm *vm)
{
    vm->vcpu = CALL(vm->vm, KVM_CREATE_VCPU, 0);
    vm->run = mmap(0, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu, 0);
    if (vm->run == MAP_FAILED)
        die("mmap of kvm_run");
    CALL(vm->vcpu, KVM_GET_TSC_KHZ, 0);
}

static void configure(struct vm *vm)
{
    struct kvm_lapic_state lapic;
    struct kvm_sregs sregs;
    uint32_t extint = 0x700, nmi = 0x400;
    CALL(vm->vcpu, KVM_SET_CPUID2, &cpuid);
    CALL(vm->vcpu, KVM_GET_LAPIC, &lapic);
    memcpy(lapic.regs + 0x350, &extint, 4);
    memcpy(lapic.regs + 0x360, &nmi, 4);
    CALL(vm->vcpu, KVM_SET_LAPIC, &lapic);
    CALL(vm->vcpu, KVM_SET_MSRS, &msrs);
    CALL(vm->vcpu, KVM_GET_SREGS, &sregs);
    memcpy(&recipe.sregs.interrupt_bitmap, &sregs.interrupt_bitmap, sizeof sregs.interrupt_bitmap);
    recipe.sregs.apic_base = sregs.apic_base;
    CALL(vm->vcpu, KVM_SET_SREGS, &recipe.sregs);
    CALL(vm->vcpu, KVM_SET_REGS, &recipe.regs);
}

static void load(struct vm *vm)
{
    for (uint32_t i = 0; i < recipe.segments; i++)
        memcpy(vm->memory + segments[i].address, contents[i], segments[i].size);
}

static void destroy(struct vm *vm)
{
    munmap(vm->run, vm->run_size);
    close(vm->vcpu);
    munmap(vm->memory, memory_size);
    close(vm->vm);
    close(vm->kvm);
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void make_vm(struct vm *vm)
{
    open_system(vm);
    create(vm);
    if (irqchip_first)
        create_interrupt_controllers(vm);
    create_memory(vm);
    if (!irqchip_first)
        create_interrupt_controllers(vm);
    create_vcpu(vm);
    load(vm);
    configure(vm);
}

static void prepare(const char *path, const char *mib)
{
    memory_size = strtoul(mib, 0, 10) << 20;
    read_recipe(path);
}

/* One sample for each line on stdin, its nanoseconds on stdout. */
static inline int serve(int count, char **words, uint64_t (*sample)(void))
{
    char line[64];
    if (count != 3 && count != 4)
        die("usage: floor RECIPE MIB [irqchip-first]");
    irqchip_first = count == 4;
    prepare(words[1], words[2]);
    while (fgets(line, sizeof line, stdin)) {
        printf("%llu\n", (unsigned long long)sample());
        fflush(stdout);
    }
    return 0;
}
