"""How models are sampled and measured: the parts of `di4c_ext.evaluate`, which `di4c_ext.distill` uses as well.

`settings` (the flags), `cast` (who is sampled, and how), `compare` (a row of figures for each of these), `latents`
(what a student's latent carries), `latency` (seconds, and what the latent adds), `enumerable` (exact laws of problems
that are small enough), `store` (rows that are kept, so that a stopped evaluation goes on).
"""
