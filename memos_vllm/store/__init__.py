"""KV off the GPU: who owns a slot or a file (scheduler side), and who moves the bytes (worker side).

scheduler side                      worker side
identity    what a block holds      transfer      runs operations, reports results
host_pool   key -> host slot        jobs          an operation whose pieces end on several threads
disk_index  key -> chunk on disk    link          GPU (or CPU) blocks <-> host rows
                                    pipeline      in which order a device does it
                                    cuda_device   with which calls
                                    copy_planner  by which method
                                    host_memory   the bytes of the host slots
                                    kv_file       one immutable safetensors file per chunk and rank
ops         what the scheduler side tells the worker side, and what it answers
"""
