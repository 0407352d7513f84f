"""What tests share: tiny models, values, stores, oracles. No test in here."""
