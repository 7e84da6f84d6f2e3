"""The manager's parts. One decision goes generation -> decider -> metadata, policy -> placement.

What happens to the wish about a prompt, and to a chunk of KV cache; these words and no others:

=========  =================================================================================
wish       tier and TTL that a decision came to, counted from an access (`draft.Wish`)
late       a wish whose chunks LMCache could not name yet; a sweep makes the claim (`settling`)
claim      a wish about known chunks, in the ledger; of two, the later access counts (`claims`)
step       a claim whose TTL in a tier ended and that came down a rung of the ladder (`claims`)
unsettled  a claim some of whose chunks are not where it wants them; a sweep moves them (`settling`)
moving     a chunk that some move is about now: no other one may begin (`motion`)
shed       a decision that was given up because too many waited; its KV gets a late wish (`decider`)
adopted    KV that no claim is about (a crash, a full table): claimed where it is (`recovery`)
=========  =================================================================================
"""
