//! Counters, kept per worker and summed when read.
