//! Settings from YAML and the environment.
