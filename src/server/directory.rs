//! The directory of agents, as the admin port shows it.
