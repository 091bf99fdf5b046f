// SPDX-License-Identifier: MIT OR Apache-2.0

//! What targets need of files beyond the standard library.

use std::fs::File;
use std::path::Path;

/// Makes the names of files that were created in a directory durable; syncing a file does not do that.
///
/// Not every file system can sync a directory, and not every user may open it. The disk works without, so that a
/// failure is only logged.
pub(super) fn sync_directory(directory: &Path) {
    if let Err(error) = File::open(directory).and_then(|directory| directory.sync_all()) {
        log::warn!("syncing {}: {error}; files created in it may be missing after a crash", directory.display());
    }
}

/// Makes the name of a file or directory that was created durable.
pub(super) fn sync_name(path: &Path) {
    // A relative path of one word has an empty parent.
    match std::path::absolute(path) {
        Ok(path) => path.parent().into_iter().for_each(sync_directory),
        Err(error) => log::warn!("finding the directory of {}: {error}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_a_directory_and_of_the_root_are_synced() {
        sync_name("file".as_ref());
        sync_name("/".as_ref());
    }
}
