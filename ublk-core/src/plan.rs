// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a device will use of what the driver offers: the one place where features are negotiated.

use crate::data::{Access, DataMovement};
use crate::error::{Error, Parameter, Result};
use crate::options::DeviceOptions;
use crate::uapi::Features;

/// Way in which a device will be served, and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// How bytes move.
    pub(crate) data: DataMovement,
    /// Many tags per command (`BATCH_IO`) instead of one each.
    pub(crate) batch: bool,
    /// Threads that share a queue's tags.
    pub(crate) threads_per_queue: u16,
    /// What to ask ADD_DEV for.
    pub(crate) features: Features,
    /// Why the data moves so, for people.
    pub(crate) reason: &'static str,
}

/// Demands of the device itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demands {
    /// What the target does with bytes.
    pub(crate) access: Access,
    /// Zones or integrity metadata: the driver has them only where it does not copy.
    pub(crate) excludes_copy: bool,
    /// Features that are needed in any case.
    pub(crate) features: Features,
}

/// Ways in which data moves that an unprivileged device cannot have.
const PRIVILEGED: Features = Features::SUPPORT_ZERO_COPY.union(Features::USER_COPY).union(Features::AUTO_BUF_REG);

impl Plan {
    /// Chooses among what the driver offers.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] if something was asked for that the driver lacks, [`Error::Conflict`] if
    /// the options contradict each other.
    pub(crate) fn choose(offered: Features, demands: &Demands, options: &DeviceOptions) -> Result<Self> {
        let (data, reason) = match options.data {
            Some(data) => (data, "as asked for"),
            None => Self::movement(offered, demands),
        };
        if demands.excludes_copy && data.is_copied_by_driver() {
            return Err(Error::conflict(
                Parameter::DataMovement,
                data,
                "zones and integrity metadata require user-copy",
            ));
        }
        let threads_per_queue = u16::try_from(options.threads_per_queue).unwrap_or(u16::MAX);
        if threads_per_queue == 0 || u32::from(threads_per_queue) > options.depth {
            return Err(Error::invalid(
                Parameter::ThreadsPerQueue,
                options.threads_per_queue,
                format!("must be from 1 to {}, the queue depth", options.depth),
            ));
        }
        // A batch belongs to no thread, and there is none of tags whose writes come in two steps.
        let batch_is_possible = threads_per_queue == 1 && data != DataMovement::GetData;
        if options.batch == Some(true) && !batch_is_possible {
            return Err(Error::conflict(
                Parameter::Batch,
                true,
                "cannot be combined with get-data or with several threads per queue",
            ));
        }
        // Linux's driver (7.3) fails requests of a batch device whose server was asked to leave, instead of holding
        // them: a hand-over would not be without failures. And it makes no batch device of depth 1.
        let by_default = options.recovery.is_none() && options.depth > 1 && offered.contains(Features::BATCH_IO);
        let batch = batch_is_possible && options.batch.unwrap_or(by_default);
        let mut features = demands.features | data.features();
        features.set(Features::BATCH_IO, batch);
        let needed = if threads_per_queue > 1 { features | Features::PER_IO_DAEMON } else { features };
        offered.require(needed)?;
        Ok(Plan { data, batch, threads_per_queue, features, reason })
    }

    /// Chooses for a user without CAP_SYS_ADMIN, whom the driver lets have less: it copies all data (memory that
    /// was not would show what others left in it), and the device ends with its server.
    ///
    /// # Errors
    ///
    /// [`Error::NeedsPrivilege`] if something was asked for that requires CAP_SYS_ADMIN.
    pub(crate) fn choose_unprivileged(offered: Features, demands: &Demands, options: &DeviceOptions) -> Result<Self> {
        let refuse =
            |parameter, value: &dyn ToString| Err(Error::NeedsPrivilege { parameter, value: value.to_string() });
        if let Some(recovery) = options.recovery {
            return refuse(Parameter::Recovery, &recovery.name());
        }
        if let Some(data) = options.data.filter(|data| data.features().intersects(PRIVILEGED)) {
            return refuse(Parameter::DataMovement, &data);
        }
        if demands.excludes_copy {
            return refuse(Parameter::DataMovement, &"user-copy, for zones or integrity metadata");
        }
        let mut plan = Self::choose(offered.difference(PRIVILEGED), demands, options)?;
        if options.data.is_none() {
            plan.reason = "the driver copies what users without CAP_SYS_ADMIN serve";
        }
        plan.features |= Features::UNPRIVILEGED_DEV;
        Ok(plan)
    }

    fn movement(offered: Features, demands: &Demands) -> (DataMovement, &'static str) {
        let has = |movement: DataMovement| offered.contains(movement.features());
        match demands.access {
            Access::Forwards { .. } if has(DataMovement::AutoRegister) => {
                (DataMovement::AutoRegister, "requests are only forwarded to files")
            }
            Access::Forwards { .. } if has(DataMovement::Register) => (
                DataMovement::Register,
                "requests are only forwarded to files; before 6.16 pages are registered one by one",
            ),
            Access::Copies if has(DataMovement::UserCopy) => {
                (DataMovement::UserCopy, "the target copies by itself, in parallel")
            }
            _ if demands.excludes_copy => (DataMovement::UserCopy, "zones and integrity metadata need it"),
            Access::Forwards { .. } => (DataMovement::Copy, "the driver has no zero copy (6.15)"),
            Access::Copies => (DataMovement::Copy, "the driver has no user copy (6.5)"),
            Access::Bytes => (DataMovement::Copy, "the target looks at the bytes"),
        }
    }

    /// Checks what the driver made of the request: it drops what it does not know, silently.
    pub(crate) fn check(&self, granted: Features) -> Result<()> {
        granted.require(self.features)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: Demands = Demands { access: Access::Bytes, excludes_copy: false, features: Features::empty() };
    const FORWARDS: Demands = Demands { access: Access::Forwards { memory_alignment: 512 }, ..BYTES };

    fn v6_12() -> Features {
        Features::from_bits_retain(0x1fe)
    }

    #[test]
    fn forwarding_is_zero_copy_where_the_driver_can() {
        let choose = |offered| Plan::choose(offered, &FORWARDS, &DeviceOptions::default()).unwrap().data;
        assert_eq!(choose(Features::all()), DataMovement::AutoRegister);
        assert_eq!(choose(v6_12() | Features::SUPPORT_ZERO_COPY), DataMovement::Register);
        assert_eq!(choose(v6_12()), DataMovement::Copy);
    }

    #[test]
    fn batches_are_used_where_the_driver_has_them_and_nothing_speaks_against_it() {
        let batch = |offered, options: &DeviceOptions| Plan::choose(offered, &BYTES, options).unwrap().batch;
        assert!(batch(Features::all(), &DeviceOptions::default()));
        assert!(!batch(v6_12(), &DeviceOptions::default()));
        assert!(!batch(Features::all(), &DeviceOptions { batch: Some(false), ..DeviceOptions::default() }));
        assert!(!batch(Features::all(), &DeviceOptions { threads_per_queue: 4, ..DeviceOptions::default() }));
        let recovery = Some(crate::Recovery::Reissue);
        assert!(!batch(Features::all(), &DeviceOptions { recovery, ..DeviceOptions::default() }));
        assert!(batch(Features::all(), &DeviceOptions { recovery, batch: Some(true), ..DeviceOptions::default() }));
        let get_data = DeviceOptions { data: Some(DataMovement::GetData), ..DeviceOptions::default() };
        assert!(!batch(Features::all(), &get_data));
        assert!(!batch(Features::all(), &DeviceOptions { depth: 1, ..DeviceOptions::default() }));
        assert!(batch(Features::all(), &DeviceOptions { depth: 1, batch: Some(true), ..DeviceOptions::default() }));
    }

    #[test]
    fn a_feature_that_is_missing_is_named_with_its_kernel() {
        for (options, words) in [
            (DeviceOptions { batch: Some(true), ..DeviceOptions::default() }, ["BATCH_IO", "7.0"]),
            (DeviceOptions { threads_per_queue: 2, ..DeviceOptions::default() }, ["PER_IO_DAEMON", "6.16"]),
            (
                DeviceOptions { data: Some(DataMovement::Register), ..DeviceOptions::default() },
                ["SUPPORT_ZERO_COPY", "6.15"],
            ),
        ] {
            let error = Plan::choose(v6_12(), &BYTES, &options).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }

    #[test]
    fn users_have_devices_whose_data_the_driver_copies() {
        let choose = |demands, options: &DeviceOptions| Plan::choose_unprivileged(Features::all(), demands, options);
        let plan = choose(&FORWARDS, &DeviceOptions::default()).unwrap();
        assert_eq!(plan.data, DataMovement::Copy);
        assert!(plan.features.contains(Features::UNPRIVILEGED_DEV));
        assert!(!plan.features.intersects(PRIVILEGED | Features::USER_RECOVERY | Features::QUIESCE));
        let get_data = DeviceOptions { data: Some(DataMovement::GetData), ..DeviceOptions::default() };
        assert_eq!(choose(&BYTES, &get_data).unwrap().data, DataMovement::GetData);
        for options in [
            DeviceOptions { recovery: Some(crate::Recovery::Queue), ..DeviceOptions::default() },
            DeviceOptions { data: Some(DataMovement::UserCopy), ..DeviceOptions::default() },
            DeviceOptions { data: Some(DataMovement::AutoRegister), ..DeviceOptions::default() },
        ] {
            let error = choose(&FORWARDS, &options).unwrap_err().to_string();
            assert!(error.contains("CAP_SYS_ADMIN"), "{error}");
        }
        assert!(choose(&Demands { excludes_copy: true, ..BYTES }, &DeviceOptions::default()).is_err());
    }

    #[test]
    fn wishes_that_contradict_each_other_are_refused() {
        let both = DeviceOptions { batch: Some(true), threads_per_queue: 2, ..DeviceOptions::default() };
        assert!(Plan::choose(Features::all(), &BYTES, &both).is_err());
        for threads_per_queue in [0, 129] {
            let options = DeviceOptions { threads_per_queue, ..DeviceOptions::default() };
            assert!(Plan::choose(Features::all(), &BYTES, &options).is_err());
        }
        let zoned = Demands { excludes_copy: true, ..BYTES };
        let copy = DeviceOptions { data: Some(DataMovement::Copy), ..DeviceOptions::default() };
        assert!(Plan::choose(Features::all(), &zoned, &copy).is_err());
        assert_eq!(
            Plan::choose(Features::all(), &zoned, &DeviceOptions::default()).unwrap().data,
            DataMovement::UserCopy
        );
    }
}
