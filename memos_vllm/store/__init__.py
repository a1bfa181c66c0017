"""KV off the GPU: who owns a slot or a file (scheduler side), and who moves the bytes (worker side).

scheduler side                      worker side
identity    what a block holds      transfer      runs operations, reports results
manager     plans the operations    jobs          an operation whose pieces end on several threads
in_flight   those under way         link          GPU (or CPU) blocks <-> host rows
host_pool   key -> host slot        pipeline      in which order a device does it
disk_index  key -> chunk on disk    cuda_device   with which calls
chunk_files what a chunk's files    copy_planner  by which method
            are called              host_memory   the bytes of the host slots
                                    kv_file       one immutable safetensors file per chunk and rank
ops         what the scheduler side tells the worker side, and what it answers
"""
