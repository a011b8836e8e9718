"""What is x86 and nothing else: boot protocols, memory map, page tables, descriptors, CPUID, MSRs, firmware tables."""
