/* The floor of an exit: the guest outs.S run by KVM_RUN and nothing else but looking at port and byte. Timed from the
 * newline on COM2 that begins the OUTs to the one that ends them.
 *
 *     floor_exit RECIPE MIB
 */
#include "floor_vm.h"

enum { COM2 = 0x2f8 };

static unsigned char out(struct vm *vm, unsigned *port)
{
    CALL(vm->vcpu, KVM_RUN, 0);
    if (vm->run->exit_reason != KVM_EXIT_IO)
        die("not an OUT");
    *port = vm->run->io.port;
    return ((volatile unsigned char *)vm->run)[vm->run->io.data_offset];
}

static void run_to_newline(struct vm *vm)
{
    unsigned port;
    while (out(vm, &port) != '\n' || port != COM2)
        ;
}

static uint64_t sample(void)
{
    struct vm vm;
    make_vm(&vm);
    run_to_newline(&vm);
    uint64_t begin = now();
    run_to_newline(&vm);
    uint64_t took = now() - begin;
    destroy(&vm);
    return took;
}

int main(int count, char **words)
{
    return serve(count, words, sample);
}
