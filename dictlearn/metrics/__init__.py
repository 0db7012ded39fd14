"""What is measured, one concept a file: sums in float64 over the whole evaluation set, so that the batch size,
the order of the tokens, their scale and the number of ranks cannot move a number.

Every class that keeps sums is a torchmetrics `Metric`; functions give what one token or latent adds. Targets and
reconstructions carry a site axis, `[n_tokens, n_sites, d_out]` with n_sites = 1 for a dictionary of one write
site, and values come per site, `[n_sites]`; torchmetrics makes the `[1]` of a single site a scalar. Only counted
tokens are given to a metric: the caller drops masked ones. A value that is not defined (0/0) is NaN here and null
in a report.
"""
