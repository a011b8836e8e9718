/* The floor of an exit: the guest outs.S run by KVM_RUN and nothing else but looking at the byte. Timed from the
 * newline that begins the OUTs to the one that ends them.
 *
 *     floor_exit RECIPE MIB
 */
#include "floor_vm.h"

static unsigned char out(struct vm *vm)
{
    CALL(vm->vcpu, KVM_RUN, 0);
    if (vm->run->exit_reason != KVM_EXIT_IO)
        die("not an OUT");
    return ((volatile unsigned char *)vm->run)[vm->run->io.data_offset];
}

static void run_to_newline(struct vm *vm)
{
    while (out(vm) != '\n')
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
