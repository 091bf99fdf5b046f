// SPDX-License-Identifier: MIT OR Apache-2.0

//! The scripts test the checkout that they are in, also when the program was built in another one.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory with the script `vm/run` and no other part of a checkout, and the program that was built here.
struct Copy(PathBuf);

impl Copy {
    fn new(name: &str) -> Self {
        let root = env::temp_dir().join(format!("ublk-vm-{name}-{}", std::process::id()));
        fs::create_dir_all(root.join("vm")).unwrap();
        fs::create_dir_all(root.join("target/release")).unwrap();
        let script = Path::new(&env::var_os("CARGO_MANIFEST_DIR").unwrap()).join("run");
        fs::copy(script, root.join("vm/run")).unwrap();
        symlink(env!("CARGO_BIN_EXE_ublk-vm"), root.join("target/release/ublk-vm")).unwrap();
        Self(root)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(self.0.join("vm/run")).env_remove("CARGO_TARGET_DIR").args(arguments).output().unwrap()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_copied_script_does_not_test_the_original_checkout() {
    let copy = Copy::new("copied");
    // Where the original would be tested, the results directory is what is refused.
    let done = copy.run(&["--no-build", "--results", "/proc/version", "--", "true"]);
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(125), "{said}");
    assert!(said.contains(&format!("{} is not a checkout", copy.0.display())), "{said}");
}

#[test]
fn the_program_alone_does_not_guess_a_checkout() {
    let done = Command::new(env!("CARGO_BIN_EXE_ublk-vm"))
        .env_remove("UBLK_VM_ROOT")
        .args(["run", "--results", "/proc/version", "--", "true"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(125), "{said}");
    assert!(said.contains("UBLK_VM_ROOT is not set"), "{said}");
}
