"""Tools: `python -m kernels check | compile | bench`, a file each.

    check      every op against its definition in fp64, on this machine
    compile    every shipped Triton kernel compiled for GPUs that need not be here
    bench      times of every op, beside other implementations that are installed

May import everything in `kernels`. Only `kernels.__main__` imports this room.
"""
