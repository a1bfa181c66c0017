"""KV off the GPU: who owns a slot or a file (scheduler side), and who moves the bytes (worker side).

scheduler side                      worker side
identity    what a block holds      transfer     runs operations, reports results
host_pool   key -> host slot        link         GPU (or CPU) blocks <-> host rows
disk_index  key -> chunk on disk    host_memory  the bytes of the host slots
                                    kv_file      one immutable safetensors file per chunk and rank
ops         what the scheduler side tells the worker side, and what it answers
"""
