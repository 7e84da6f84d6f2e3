"""The fault campaign: a real stack under a stream of generations, while seeded faults hit it.

`make chaos`; what it checks after each fault, and what it found: docs/chaos.md. From the part
that touches the machine to the part that judges: `proxy`, `child` (the server's module, made to
fail), `worker` (engine and manager, in processes that can be killed), `module` (asks the server's),
`machine` (services, disk, Redis), `faults`, `campaign`, `report`.
"""
