DROP TABLE configurations;
DROP TABLE applications;
DROP FUNCTION start_versions, keep_application_version, keep_configuration_version, renew_application;
DROP FUNCTION configuration_ids_now;
