"""A person's look at a filter: rows near its cut, drawn, shown, decided on, and compared with it."""
