"""Human review of a filter: rows near its threshold are sampled, shown, decided on, and compared with the filter."""
