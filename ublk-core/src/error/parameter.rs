// SPDX-License-Identifier: MIT OR Apache-2.0

//! Names of what can be set.

use std::fmt;

/// Parameter that an invalid value was given for, in an [`Error`](super::Error).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Parameter {
    /// Capacity of the disk in bytes.
    Size,
    /// Smallest addressable unit.
    LogicalBlockSize,
    /// Smallest unit that is written without read-modify-write.
    PhysicalBlockSize,
    /// Preferred smallest request.
    IoMin,
    /// Preferred request for streaming.
    IoOpt,
    /// Longest read or write.
    MaxIoBytes,
    /// What the target can do besides reading.
    Operations,
    /// Smallest unit that a discard can free.
    DiscardGranularity,
    /// Where the first such unit begins.
    DiscardAlignment,
    /// Longest discard.
    MaxDiscard,
    /// Longest write of zeros.
    MaxWriteZeroes,
    /// Boundary that no request crosses.
    ChunkSize,
    /// Where the memory of a request may break.
    VirtBoundaryMask,
    /// Alignment of the clients' memory.
    DmaAlignment,
    /// Most segments of a request.
    MaxSegments,
    /// Largest segment.
    MaxSegmentSize,
    /// Boundary that no segment crosses.
    SegmentBoundaryMask,
    /// Whether the disk has zones.
    Zones,
    /// Size of a zone.
    ZoneSize,
    /// Number of conventional zones, which have no write pointer.
    ConventionalZones,
    /// Most open zones.
    MaxOpenZones,
    /// Most active zones.
    MaxActiveZones,
    /// Longest zone append.
    MaxZoneAppend,
    /// Integrity metadata of each block.
    Integrity,
    /// Bytes of metadata for each interval.
    MetadataSize,
    /// Where in the metadata the protection information is.
    PiOffset,
    /// Bytes of data that the metadata of one interval protects.
    IntegrityInterval,
    /// Whether the protection information has a reference tag.
    ReferenceTag,
    /// Most segments of a request's metadata.
    MaxIntegritySegments,
    /// Number of the device.
    DeviceId,
    /// Number of queues.
    Queues,
    /// Most requests in flight in a queue.
    Depth,
    /// Threads that share a queue.
    ThreadsPerQueue,
    /// How the data of requests moves.
    DataMovement,
    /// Whether commits and fetches are combined.
    Batch,
    /// What happens to requests when the server dies.
    Recovery,
    /// Memory shared with clients.
    SharedMemory,
    /// Longest wait of request coalescing.
    Coalescing,
    /// CPUs of the server's threads.
    Cpus,
    /// Identity of what the disk is stored in.
    BackingFile,
    /// An option of the `ublk` command.
    CommandLine(&'static str),
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Parameter::Size => "size",
            Parameter::LogicalBlockSize => "logical block size",
            Parameter::PhysicalBlockSize => "physical block size",
            Parameter::IoMin => "io_min",
            Parameter::IoOpt => "io_opt",
            Parameter::MaxIoBytes => "maximum request size",
            Parameter::Operations => "operations",
            Parameter::DiscardGranularity => "discard granularity",
            Parameter::DiscardAlignment => "discard alignment",
            Parameter::MaxDiscard => "longest discard",
            Parameter::MaxWriteZeroes => "longest write of zeros",
            Parameter::ChunkSize => "chunk size",
            Parameter::VirtBoundaryMask => "virt boundary mask",
            Parameter::DmaAlignment => "DMA alignment",
            Parameter::MaxSegments => "most segments",
            Parameter::MaxSegmentSize => "maximum segment size",
            Parameter::SegmentBoundaryMask => "segment boundary mask",
            Parameter::Zones => "zones",
            Parameter::ZoneSize => "zone size",
            Parameter::ConventionalZones => "conventional zones",
            Parameter::MaxOpenZones => "maximum open zones",
            Parameter::MaxActiveZones => "maximum active zones",
            Parameter::MaxZoneAppend => "maximum zone append size",
            Parameter::Integrity => "integrity metadata",
            Parameter::MetadataSize => "metadata size",
            Parameter::PiOffset => "offset of the protection information",
            Parameter::IntegrityInterval => "integrity interval",
            Parameter::ReferenceTag => "reference tag",
            Parameter::MaxIntegritySegments => "most segments of metadata",
            Parameter::DeviceId => "device id",
            Parameter::Queues => "queues",
            Parameter::Depth => "queue depth",
            Parameter::ThreadsPerQueue => "threads per queue",
            Parameter::DataMovement => "data movement",
            Parameter::Batch => "batch",
            Parameter::Recovery => "recovery",
            Parameter::SharedMemory => "shared memory",
            Parameter::Coalescing => "coalescing",
            Parameter::Cpus => "CPUs",
            Parameter::BackingFile => "backing file",
            Parameter::CommandLine(option) => option,
        })
    }
}
