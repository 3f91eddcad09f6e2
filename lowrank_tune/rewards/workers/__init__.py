"""Worker processes that compute rewards: pool, process, protocol, limits. Each `*_worker` module of a verifier has
`load(spec)`, which returns the function that grades one completion."""
